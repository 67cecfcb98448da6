"""evaluate: planted tasks get the verdict they must get; what it writes; what it shares with infer; branches and seeds."""

import numpy as np
import pytest
from evaluating import COSTLY, ROWS, evaluated, rows_of
from folders import own_task, states
from planted import HELPING, HOPELESS

from stages.lifecycle.context import GIVE_VALIDATION, PROBABLY_SEEN


@pytest.fixture(scope="module")
def helped(ocd, make_run):
    tuned = {"train-diffusion": HELPING["train-diffusion"] | {"tune_after": 100, "tune_samples": 32}}
    folder = make_run(HELPING | tuned, "planted", "train-scale")
    return folder, evaluated(ocd, folder)


@pytest.fixture(scope="module")
def hopeless_run(ocd, make_run):
    folder = make_run(HOPELESS, "planted", "train-scale")
    return folder, evaluated(ocd, folder)


def test_ocd_helps_where_the_layers_input_tells_the_residual(helped):
    _, results = helped
    assert results["verdict"].startswith("OCD helps: mse ")
    for name in ("base", "random training deltas", "shuffled conditioning"):
        assert results["comparisons"][name]["interval"][1] < 0, name
    assert results["confidence"] == 0.99


def test_of_a_tuned_denoiser_no_strength_above_one_is_tried(helped):
    """Its lengths are what the task's loss has chosen; those of others are not."""
    folder, results = helped
    assert rows_of(results)["ocd validated strength"]["strength"] <= 1
    assert max(map(float, folder.read("evaluate/strength.json")["losses"])) == 1
    assert not any("ocd validated strength" in text for text in results["warnings"])


def test_ocd_does_not_help_where_labels_know_nothing_of_x(hopeless_run):
    _, results = hopeless_run
    assert results["outcome"] in ("does not help", "harms")
    # Averaging cures over-confidence, and so does a temperature, which is named before anything else may count as a gain.
    rows = rows_of(results)
    assert results["temperature"] > 1.2
    assert rows["temperature-scaled base"]["metrics"]["cross_entropy"]["interval"][1] < 0


def test_ocd_harms_at_a_strength_that_is_forced(ocd, hopeless_run):
    folder, _ = hopeless_run
    results = evaluated(ocd, folder, "--set", "infer.strength=8")
    assert results["verdict"].startswith("OCD harms: cross_entropy ")
    assert rows_of(results)["ocd ensemble"]["strength"] == 8
    # The strength that validation chooses does not do that harm.
    chosen = rows_of(results)["ocd validated strength"]
    assert chosen["strength"] < 8
    assert chosen["metrics"]["cross_entropy"]["mean"] < rows_of(results)["ocd ensemble"]["metrics"]["cross_entropy"]["mean"]


def test_every_row_has_its_figures(hopeless_run):
    _, results = hopeless_run
    assert [row["name"] for row in results["rows"]] == ROWS
    assert [entry["name"] for entry in results["left_out"]] == COSTLY
    names = {"cross_entropy", "accuracy", "brier_score", "calibration_error", "auroc_of_confidence", "auroc_of_disagreement"}
    for row in results["rows"]:
        assert set(row["metrics"]) == names, row["name"]
        for name, figures in row["metrics"].items():
            if figures["mean"] is None:
                assert name == "auroc_of_disagreement"
                assert figures["reason"] in ("its prediction has one member", "its members agree")
            elif name != "auroc_of_disagreement":
                low, high = figures["interval"]
                assert low <= figures["difference"] <= high
                assert figures["standard_error"] > 0
    assert rows_of(results)["base"]["metrics"]["accuracy"]["interval"] == [0, 0]
    assert rows_of(results)["overfitted on test"]["metrics"]["accuracy"]["difference"] > 0
    assert results["metric"] == "cross_entropy"
    assert results["samples"] == 300
    assert results["validation_samples"] == 200


def test_it_tells_what_ocd_costs_and_whether_it_copies(hopeless_run):
    folder, results = hopeless_run
    cost, found = results["cost"], results["memorisation"]
    assert cost["parameters"]["base"] == 6 * 24 + 24 + 24 * 3 + 3
    trained = folder.summary("train-diffusion")
    assert cost["parameters"]["denoiser"] == trained["parameters"]
    assert cost["parameters"]["scale"] > 0
    assert 0 < cost["base_ms"] < cost["ocd_one_draw_ms"]
    assert set(cost["stage_seconds"]) == {"train-base", "select-layer", "collect", "train-diffusion", "train-scale"}
    assert found["samples"] == 50
    # A generated delta is nearer to the nearest of the training deltas than to their mean, and cannot know its label here.
    assert found["generated_nearest"] >= found["generated_mean"]
    assert found["generated_true"] < 0.9
    assert all(-1 <= value <= 1 for name, value in found.items() if name != "samples")


def test_a_regression_has_likelihood_and_coverage(helped):
    _, results = helped
    left_out = {entry["name"]: entry["reason"] for entry in results["left_out"]}
    assert left_out["temperature-scaled base"] == "the task has no classes"
    assert left_out["mean delta of class"] == "the task has no classes"
    for row in results["rows"]:
        metrics = row["metrics"]
        assert set(metrics) == {"mse", "mae", "rmse", "log_likelihood", "coverage"}
        assert metrics["rmse"]["mean"] == pytest.approx(metrics["mse"]["mean"] ** 0.5)
        # The variance is fitted on validation samples: intervals for 95 % of the numbers must hold about as many.
        assert 0.85 < metrics["coverage"]["mean"] <= 1, row["name"]


def test_its_rows_of_ocd_are_what_infer_predicts(ocd, helped):
    folder, results = helped
    ocd(folder, "infer", "--quiet")
    metrics = folder.summary("infer/test")["metrics"]
    rows = rows_of(results)
    for name in ("base", "ocd one draw", "ocd ensemble"):
        # Rounding: their batches differ.
        assert rows[name]["metrics"]["mse"]["mean"] == pytest.approx(metrics[name]["mse"], rel=1e-4)


def test_infer_at_the_fitted_strength(ocd, hopeless_run):
    folder, results = hopeless_run
    evaluated(ocd, folder)
    fitted = folder.read("evaluate/strength.json")
    assert fitted["strength"] == rows_of(results)["ocd validated strength"]["strength"]
    assert min(fitted["losses"], key=fitted["losses"].get) == f"{fitted['strength']}"
    summary = ocd.json(folder, "infer", "--strength", "auto")
    assert summary["strength"] == fitted["strength"]
    shown = rows_of(results)["ocd validated strength"]["metrics"]["cross_entropy"]["mean"]
    assert summary["metrics"]["ocd ensemble"]["cross_entropy"] == pytest.approx(shown, rel=1e-4)
    assert "up to date" in ocd(folder, "infer", "--strength", "auto").stdout
    # Evaluated otherwise, there is another strength; the answer made with the old one is no answer any more.
    forced = ("--set", "infer.strength=auto", "--set", "evaluate.strengths=[0.125]")
    evaluated(ocd, folder, *forced)
    assert states(ocd, folder, *forced[1::2])["infer"] == "stale"
    assert ocd.json(folder, "infer", *forced)["strength"] == 0.125


def test_run_evaluates_where_predictions_need_it(ocd, project):
    auto = ("--set", "infer.strength=auto")
    folder = project(rows=120)
    stages = ocd.json(folder, "run", *auto)["stages"]
    assert list(stages)[-2:] == ["evaluate", "infer"]
    assert stages["infer"]["strength"] == rows_of(stages["evaluate"])["ocd validated strength"]["strength"]
    assert set(states(ocd, folder, auto[1]).values()) == {"done"}


def test_no_strength_where_nothing_could_be_fitted(ocd, finished):
    ocd(finished, "evaluate", "--quiet")
    fitted = finished.read("evaluate/strength.json")
    assert fitted["strength"] is None
    shown = ocd(finished, "infer", "--strength", "auto", code=3)
    assert "evaluate fitted no strength, for want of validation samples" in shown.stderr


def test_an_evaluation_is_redone_when_asked_otherwise(ocd, finished):
    first = ocd(finished, "evaluate")
    verdict = finished.read("evaluate/results.json")["verdict"]
    assert verdict in " ".join(first.stdout.split())
    before = finished.files()
    again = ocd(finished, "evaluate")
    assert again.stdout.startswith("evaluate: up to date")
    assert finished.files() == before
    other = ocd(finished, "evaluate", "--set", "evaluate.samples=10")
    assert "evaluate is redone: evaluate.samples was 'all', is now 10" in other.stderr
    assert finished.read("evaluate/results.json")["samples"] == 10
    ocd(finished, "verify")


def test_a_task_adds_rows(ocd, project):
    folder = project({"task": own_task("task:ExtraRow", row="twice as sure", samples=90)}, code="tasks", until="train-scale")
    rows = rows_of(evaluated(ocd, folder))
    assert rows["twice as sure"]["metrics"]["accuracy"]["difference"] == 0
    assert rows["twice as sure"]["metrics"]["cross_entropy"]["difference"] != 0


def test_faults_of_extra_rows(ocd, project):
    folder = project({"task": own_task("task:ExtraRow", row="base", samples=90)}, code="tasks", until="train-scale")
    shown = ocd(folder, "evaluate", code=2)
    assert "the task's own rows: extra_rows()\n" in shown.stderr
    assert "extra_rows() gave a row named 'base', which ocd has itself" in shown.stderr
    assert not (folder.run / "evaluate").exists()


def test_without_validation_samples_no_strength_is_fitted(ocd, project):
    # A store of all rows: of the four validation samples the trainings have held out one at most.
    folder = project({"collect": {"split": "all"}}, until="train-scale")
    results = evaluated(ocd, folder)
    left_out = {entry["name"]: entry["reason"] for entry in results["left_out"]}
    for name in ("ocd validated strength", "temperature-scaled base"):
        assert left_out[name] == "there are not 5 validation samples that neither base nor denoiser was trained on"
    # What a sceptic would try is there all the same, at OCD's own strength; but without a temperature nothing is proved.
    for name in ("random training deltas", "shuffled conditioning"):
        assert rows_of(results)[name]["strength"] == 1
        assert not rows_of(results)[name]["validated"]
    assert results["outcome"] != "helps"
    assert results["validation_samples"] == 0
    assert rows_of(results)["ocd ensemble"]["strength"] == 1


def test_imported_weights_come_with_a_warning(ocd, finished, project):
    folder = project()
    ocd(folder, "train-base", "--weights", finished.run / "train-base" / "base.safetensors")
    ocd(folder, "run", "--quiet", "--until", "train-scale")
    shown = ocd(folder, "evaluate")
    said = f"warning: {PROBABLY_SEEN}: no strength and no temperature is fitted; {GIVE_VALIDATION}"
    assert " ".join(shown.stdout.split()).count(said) == 1
    results = folder.read("evaluate/results.json")
    assert [text for text in results["warnings"] if "train-base: " not in text] == [said.removeprefix("warning: ")]
    assert {row["name"] for row in results["rows"]}.isdisjoint({"temperature-scaled base", "ocd validated strength"})
    assert not any(row["validated"] for row in results["rows"])
    left_out = {
        entry["name"]: entry["reason"]
        for entry in evaluated(ocd, folder, "--add", "base trained for as long again")["left_out"]
    }
    assert left_out["base trained for as long again"].startswith("the base was imported")


def test_imported_weights_are_judged_on_a_validation_set_of_its_own(ocd, finished, project):
    folder = project({"task": {"validation": "validation.npz"}})
    arrays = dict(np.load(finished.root / "test.npz"))
    folder.save("validation.npz", arrays["x"][:20], arrays["y"][:20])
    ocd(folder, "train-base", "--weights", finished.run / "train-base" / "base.safetensors")
    ocd(folder, "run", "--quiet", "--until", "train-scale")
    results = evaluated(ocd, folder)
    assert results["validation_samples"] == 20
    assert results["temperature"] is not None


def test_a_strength_at_the_edge_of_what_was_tried_is_named(ocd, helped):
    folder, _ = helped
    results = evaluated(ocd, folder, "--set", "evaluate.strengths=[0, 0.1]")
    assert rows_of(results)["ocd validated strength"]["strength"] == 0.1
    *_, warning = results["warnings"]
    assert warning.startswith("the largest strength tried, 0.1, is the best for ocd validated strength")
    assert warning.endswith("a larger one may be better: name more with evaluate.strengths")


def test_no_label_reaches_a_prediction(ocd, finished):
    """Other test labels change what a row is worth, never what OCD or a neighbour predicts: only the oracles differ."""
    first = rows_of(evaluated(ocd, finished))
    arrays = dict(np.load(finished.root / "test.npz"))
    finished.save("test.npz", arrays["x"], (arrays["y"] + 1) % 3)
    strengths = {name: row["strength"] for name, row in first.items()}
    ocd(finished, "train-base", "--quiet")
    second = rows_of(evaluated(ocd, finished))
    assert {name: row["strength"] for name, row in second.items()} == strengths
    for name, row in second.items():
        confidence = [entry[name]["metrics"]["calibration_error"]["mean"] for entry in (first, second)]
        assert confidence[0] != confidence[1] or name.startswith("overfitted")
        assert row["members"] == first[name]["members"]
