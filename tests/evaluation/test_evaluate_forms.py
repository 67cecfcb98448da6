"""evaluate and probe on tasks of every form: what does not apply is left out with the reason, nothing ends in a traceback."""

import json

import pytest

from stages.evaluation.rows import TABLE

HEAD = """\
import torch
import torch.nn.functional as F
from torch import nn
from stages.foundation.seeds import generator
from stages.tasks.data import ArrayDataset
from stages.tasks.losses import CLASSIFICATION, OTHER, REGRESSION
from stages.tasks.protocol import Task


class Base(Task):
    classes = 3

    def model(self):
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))

    def labels(self, x, draw):
        return (x[:, :3] + torch.randn(len(x), 3, generator=draw)).argmax(1)

    def points(self, name, count):
        draw = generator("forms", name)
        x = torch.randn(count, 4, generator=draw)
        return ArrayDataset(x, self.labels(x, draw))

    def train(self):
        return self.points("train", 100)

    def validation(self):
        return self.points("validation", 24)

    def test(self):
        return self.points("test", 30)
"""

LOG_PROBABILITIES = """
class Mine(Base):
    kind = CLASSIFICATION

    def model(self):
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3), nn.LogSoftmax(1))

    def loss(self, output, y):
        return F.nll_loss(output, y, reduction="none")
"""

BINARY = """
class Mine(Base):
    kind = CLASSIFICATION

    def model(self):
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1), nn.Flatten(0))

    def labels(self, x, draw):
        return (x[:, 0] > 0).float()

    def loss(self, output, y):
        return F.binary_cross_entropy_with_logits(output, y, reduction="none")

    def metrics(self, output, y):
        return {"right": ((output > 0) == (y > 0.5)).float()}
"""

A_DICT = """
class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        hidden = self.body(x).tanh()
        return {"logits": self.head(hidden), "hidden": hidden}


class Mine(Base):
    kind = CLASSIFICATION

    def model(self):
        return Two()

    def loss(self, output, y):
        return F.cross_entropy(output["logits"], y, reduction="none")

    def metrics(self, output, y):
        return {"accuracy": (output["logits"].argmax(1) == y).float()}
"""

PICTURES = """
class Mine(Base):
    kind = CLASSIFICATION

    def model(self):
        return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 3, padding=1))

    def points(self, name, count):
        draw = generator("pictures", name)
        x = torch.randn(count // 3, 1, 40, 40, generator=draw)
        return ArrayDataset(x, (x[:, 0] > 0).long() + (x[:, 0] > 1).long())

    def loss(self, output, y):
        return F.cross_entropy(output, y, reduction="none").mean((1, 2))
"""

NAMES = """
class Mine(Base):
    kind = CLASSIFICATION

    def loss(self, output, y):
        return F.cross_entropy(output, y, reduction="none")

    def metrics(self, output, y):
        own = 2 * F.cross_entropy(output, y, reduction="none")
        return {"loss": own, "brier_score": own, "calibration_error": own}
"""

NOT_A_NUMBER = """
class Mine(Base):
    kind = REGRESSION

    def model(self):
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1), nn.Flatten(0))

    def labels(self, x, draw):
        return x[:, 0].clamp(-0.5, 0.5)

    def loss(self, output, y):
        return ((output + 1.2).sqrt() - y).square()
"""

OWN_FIELDS = """
class Mine(Base):
    kind = OTHER

    def conditioning(self, x, output, captured):
        return {"seen": captured["layer_input"], "given": output}

    def labels(self, x, draw):
        return x[:, :3]

    def loss(self, output, y):
        return (output - y).abs().mean(1)
"""

FORMS = {
    "log-probabilities": LOG_PROBABILITIES,
    "binary": BINARY,
    "a dict": A_DICT,
    "pictures": PICTURES,
    "metrics of the same names": NAMES,
    "not a number": NOT_A_NUMBER,
    "own fields": OWN_FIELDS,
}
NO_CLASS_MEAN = "the store has no logits of one class number a sample"
NO_LOGITS = "outputs and labels are not logits and class numbers"


def made(project, ocd, source, **collect):
    unset = dict.fromkeys(("model", "loss", "train", "test"))
    settings = {"task": {"class": "mytask:Mine", **unset}, "select-layer": {"draws": 0, "layer": "2.weight"}}
    folder = project({**settings, "collect": collect, "evaluate": {"resamples": 200, "memorisation_samples": 8}})
    (folder.root / "mytask.py").write_text(HEAD + source)
    return folder


@pytest.fixture(scope="module")
def evaluated(ocd, tmp_path_factory):
    """The results and the reasons of what was left out, of each form once."""
    from conftest import make_folder

    found = {}

    def results(name):
        if name not in found:
            folder = made(
                lambda settings: make_folder(tmp_path_factory.mktemp("forms") / "project", settings), ocd, FORMS[name]
            )
            words = ("--set", "select-layer.layer=head.weight") if name == "a dict" else ()
            ocd(folder, "run", "--quiet", "--until", "train-scale", *words)
            ocd(folder, "probe", "--quiet", "--samples", 10, *words)
            result = json.loads(ocd(folder, "evaluate", "--json", "--quiet", *words).stdout)
            found[name] = result, {entry["name"]: entry["reason"] for entry in result["left_out"]}, folder
        return found[name]

    return results


@pytest.mark.parametrize("name", FORMS)
def test_every_row_is_there_or_left_out(evaluated, name):
    results, left_out, _ = evaluated(name)
    assert {row["name"] for row in results["rows"]} | set(left_out) == set(TABLE)
    assert any(word in results["verdict"] for word in ("helps", "does not help", "harms"))


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
    fitted = json.loads((folder.run / "evaluate" / "strength.json").read_text())
    assert fitted["strength"] is not None


def test_fields_of_the_tasks_own(evaluated, ocd):
    results, left_out, folder = evaluated("own fields")
    assert left_out["nearest neighbour in layer input"] == "the store has no field layer_input"
    assert left_out["nearest k blended in layer input"] == "the store has no field layer_input"
    assert "nearest neighbour" in {row["name"] for row in results["rows"]}
    again = json.loads(ocd(folder, "evaluate", "--json", "--quiet", "--add", "ocd conditioned on x").stdout)
    reasons = {entry["name"]: entry["reason"] for entry in again["left_out"]}
    assert reasons["ocd conditioned on x"].startswith("collect.condition_on_x = true beside a conditioning() of the task's own")


def test_the_batch_size_changes_nothing_but_rounding(evaluated, ocd):
    results, _, folder = evaluated("log-probabilities")
    for size in (3, 4, 29):
        words = ("--json", "--quiet", "--force", "--set", f"evaluate.batch_size={size}")
        other = json.loads(ocd(folder, "evaluate", *words).stdout)
        for mine, its in zip(results["rows"], other["rows"], strict=True):
            assert mine["strength"] == its["strength"], mine["name"]
            # Products of other batches round otherwise, in float32.
            for name, figures in mine["metrics"].items():
                if figures["mean"] is not None:
                    assert its["metrics"][name]["mean"] == pytest.approx(figures["mean"], rel=1e-4, abs=1e-6), mine["name"]


def test_a_sample_is_not_its_own_neighbour(ocd, project):
    """Of a store that holds validation samples, too, none is compared with its own delta."""
    folder = project({"collect": {"split": "all"}, "evaluate": {"resamples": 200}}, rows=400)
    ocd(folder, "run", "--quiet", "--until", "train-scale", "--set", "task.validation_fraction=0.5")
    seen = []
    from stages.evaluation import from_run

    original = from_run.nearest

    def noted(*given, **named):
        found = original(*given, **named)
        seen.append(found.distance[:, 0])
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(from_run, "nearest", noted)
        ocd(folder, "evaluate", "--quiet", "--set", "task.validation_fraction=0.5")
    # Test samples in x and in the layer's input, then validation samples: no two samples are the same.
    assert len(seen) == 4
    assert all(float(distance.min()) > 0 for distance in seen)


FROM_A_FILE = """
import pathlib


class Mine(Base):
    kind = CLASSIFICATION

    def points(self, name, count):
        found = super().points(name, count)
        found.x = found.x * float(pathlib.Path(__file__).with_name("scale.txt").read_text())
        return found

    def loss(self, output, y):
        return F.cross_entropy(output, y, reduction="none")
"""


def test_branches_follow_data_that_only_code_reads(ocd, project):
    folder = made(project, ocd, FROM_A_FILE)
    words = ("--quiet", "--seeds", "2", "--add", "deterministic hypernetwork")
    contents = []
    for scale in ("1.0", "1.5"):
        (folder.root / "scale.txt").write_text(scale)
        ocd(folder, "run", "--force", "--quiet", "--until", "train-scale")
        ocd(folder, "evaluate", *words)
        runs = [folder.run, folder.run / "branches" / "deterministic-hypernetwork", folder.run / "branches" / "seed-2"]
        manifests = [json.loads((run / "train-base" / "manifest.json").read_text()) for run in runs]
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


def test_a_metric_that_is_one_number(ocd, project):
    folder = made(project, ocd, NAMES.replace("return {", "return {'mean': own.mean(), "))
    shown = ocd(folder, "train-base", code=2)
    assert "metrics() gave mean as () for a batch of" in shown.stderr
