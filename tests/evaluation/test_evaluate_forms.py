"""evaluate and probe on tasks of every form: what does not apply is left out with the reason, nothing ends in a traceback."""

import pytest
import torch
from folders import own_task

from stages.evaluate import Evaluate
from stages.evaluation.neighbours import find_neighbours
from stages.evaluation.rows import TABLE
from stages.evaluation.subject import EvaluatedSamples
from stages.lifecycle.context import RunContext
from stages.run_directory.project import load_project

FORMS = {
    "log-probabilities": "LogProbabilities",
    "binary": "Binary",
    "a dict": "ADict",
    "pictures": "Pictures",
    "metrics of the same names": "Names",
    "not a number": "NotANumber",
    "own fields": "OwnFields",
}
NO_CLASS_MEAN = "the store has no logits of one class number a sample"
NO_LOGITS = "outputs and labels are not logits and class numbers"


def settings_of(name):
    return {
        "task": own_task(f"mytask:{name}"),
        "select-layer": {"draws": 0, "layer": "head.weight" if name == "ADict" else "2.weight"},
        "evaluate": {"resamples": 200, "memorisation_samples": 8},
    }


@pytest.fixture(scope="module")
def evaluated(ocd, make_run):
    """The results and the reasons of what was left out, of each form once."""
    found = {}

    def results(name):
        if name not in found:
            folder = make_run(settings_of(FORMS[name]), "forms", "train-scale")
            ocd(folder, "probe", "--quick", "--quiet", "--samples", 10)
            result = ocd.json(folder, "evaluate")
            found[name] = result, {entry["name"]: entry["reason"] for entry in result["left_out"]}, folder
        return found[name]

    return results


@pytest.mark.parametrize("name", FORMS)
def test_every_row_is_there_or_left_out(evaluated, name):
    results, left_out, _ = evaluated(name)
    assert {row["name"] for row in results["rows"]} | set(left_out) == set(TABLE)
    assert results["outcome"] in results["verdict"]


def test_log_probabilities_stay_such_at_any_temperature(evaluated):
    results, _, _ = evaluated("log-probabilities")
    losses = {row["name"]: row["metrics"][results["metric"]]["mean"] for row in results["rows"]}
    # Divided by a temperature alone they would sum to more than one, and their loss fall towards zero.
    assert abs(losses["temperature-scaled base"] - losses["base"]) < 0.2
    assert 0.05 < results["temperature"] < 20


def test_a_binary_classifier_with_one_number_a_sample(evaluated):
    results, left_out, _ = evaluated("binary")
    assert "mean delta of class" not in left_out
    base = results["rows"][0]["metrics"]
    assert base["right"]["mean"] == base["accuracy"]["mean"]
    assert base["brier_score"]["mean"] > 0


@pytest.mark.parametrize("name", ["a dict", "pictures"])
def test_no_class_means_where_there_is_no_class(evaluated, name):
    assert evaluated(name)[1]["mean delta of class"] == NO_CLASS_MEAN


def test_no_temperature_for_a_dict(evaluated):
    results, left_out, _ = evaluated("a dict")
    assert left_out["temperature-scaled base"] == NO_LOGITS
    assert results["rows"][0]["metrics"]["brier_score"]["reason"] == NO_LOGITS


def test_several_predictions_a_sample(evaluated):
    metrics = evaluated("pictures")[0]["rows"][0]["metrics"]
    assert metrics["auroc_of_confidence"]["reason"] == "a sample has several predictions"
    assert 0 <= metrics["calibration_error"]["mean"] < 1


def test_the_tasks_metrics_come_first(evaluated):
    results, _, _ = evaluated("metrics of the same names")
    for row in results["rows"]:
        metrics = row["metrics"]
        assert metrics["brier_score"]["mean"] == pytest.approx(2 * metrics["loss"]["mean"])
        assert metrics["calibration_error"]["mean"] == metrics["brier_score"]["mean"]
    assert results["metric"] == "loss"


def test_a_loss_that_is_no_number_is_null(evaluated):
    _, _, folder = evaluated("not a number")
    text = (folder.run / "evaluate" / "results.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    fitted = folder.read("evaluate/strength.json")
    assert fitted["strength"] is not None


def test_fields_of_the_tasks_own(evaluated, ocd):
    results, left_out, folder = evaluated("own fields")
    assert left_out["nearest neighbour in layer input"] == "the store has no field layer_input"
    assert left_out["nearest k blended in layer input"] == "the store has no field layer_input"
    assert "nearest neighbour" in {row["name"] for row in results["rows"]}
    again = ocd.json(folder, "evaluate", "--add", "ocd conditioned on x")
    reasons = {entry["name"]: entry["reason"] for entry in again["left_out"]}
    assert reasons["ocd conditioned on x"].startswith("collect.condition_on_x = true beside a conditioning() of the task's own")


def test_the_batch_size_changes_nothing_but_rounding(evaluated, ocd):
    results, _, folder = evaluated("log-probabilities")
    for size in (3, 4, 29):
        other = ocd.json(folder, "evaluate", "--force", "--set", f"evaluate.batch_size={size}")
        for mine, its in zip(results["rows"], other["rows"], strict=True):
            assert mine["strength"] == its["strength"], mine["name"]
            # Products of other batches round otherwise, in float32.
            for name, figures in mine["metrics"].items():
                if figures["mean"] is not None:
                    assert its["metrics"][name]["mean"] == pytest.approx(figures["mean"], rel=1e-4, abs=1e-6), mine["name"]


def test_a_sample_is_not_its_own_neighbour(ocd, project):
    """Of a store that holds validation samples, too, none is compared with its own delta."""
    folder = project({"task": {"validation_fraction": 0.5}, "collect": {"split": "all"}}, rows=400, until="train-scale")
    stage = Evaluate(RunContext(load_project(folder.config, overrides=["run.device=cpu"])))
    for split in (stage.context.test_split, stage.context.splits["validation"]):
        evaluated = EvaluatedSamples(split, torch.arange(len(split)))
        whole = stage.context.splits["all"]
        found, missing = find_neighbours(stage.subject, stage.training, evaluated, whole, 1, 16, print)
        assert missing == {}
        for kind in ("x", "layer_input"):
            # No two samples are the same.
            assert float(found[kind].distance[:, 0].min()) > 0


def test_branches_follow_data_that_only_code_reads(ocd, project):
    folder = project(settings_of("FromAFile"), code="forms")
    words = ("--quiet", "--seeds", "2", "--add", "deterministic hypernetwork")
    contents = []
    for scale in ("1.0", "1.5"):
        (folder.root / "scale.txt").write_text(scale)
        ocd(folder, "run", "--force", "--quiet", "--until", "train-scale")
        ocd(folder, "evaluate", *words)
        runs = ("", "branches/deterministic-hypernetwork/", "branches/seed-2/")
        manifests = [folder.manifest(f"{run}train-base") for run in runs]
        contents.append([manifest["content"] for manifest in manifests])
        assert contents[-1][0] == contents[-1][1]
        assert len({manifest["identity"]["inputs"]["train"] for manifest in manifests}) == 1
    assert all(first != second for first, second in zip(*contents, strict=True))


def test_more_than_asked_for_is_up_to_date(ocd, finished):
    ocd(finished, "evaluate", "--quiet", "--seeds", "2", "--add", "deterministic hypernetwork")
    again = ocd(finished, "evaluate")
    assert again.stdout.startswith("evaluate: up to date")
    assert "2 seeds" in again.stdout
    other = ocd(finished, "evaluate", "--seeds", "3", "--dry-run")
    assert "stale" in other.stdout
