"""Models, losses and data that people have reported elsewhere: they work and equal the plain loop, or are refused for what they
are."""

from pathlib import Path

import numpy as np
import pytest
import torch
from folders import make_folder, reader_of
from reference import overfit_loop
from reported import ALL, REPORTS, table

from stages.lifecycle.context import RunContext
from stages.run_directory.project import load_project
from stages.tasks.loader import losses

DOCS = Path(__file__).parent.parent.parent / "docs" / "your-model.md"
REFUSED = [name for name, report in ALL.items() if report.says]
WORKS = [name for name, report in ALL.items() if not report.says]
# Rows that the loop goes through.
FEW = 8


@pytest.fixture
def reported(tmp_path):
    def make(name):
        report = ALL[name]
        folder = make_folder(
            tmp_path / "project",
            {
                "task": report.task,
                "train-base": {"epochs": 1},
                "select-layer": {"layer": report.layer, "draws": 0},
                "collect": {"steps": 2, "lr": 0.01, **(report.collect or {})},
            },
            "reported",
        )
        if report.data:
            report.data(folder)
        return folder

    return make


@pytest.mark.parametrize("name", REFUSED)
def test_refused_for_what_it_is(ocd, reported, name):
    folder = reported(name)
    message = ocd(folder, "run", "--until", ALL[name].until, "--quiet", code=2).stderr
    assert message.startswith("error: ")
    for fact in ALL[name].says:
        assert fact in message
    assert not (folder.run / "collect").exists()


@pytest.mark.parametrize("name", WORKS)
def test_deltas_equal_the_plain_loop(ocd, reported, name):
    folder, report = reported(name), ALL[name]
    ocd(folder, "run", "--until", report.until, "--quiet")
    if report.until == "infer":
        ocd(folder, "evaluate", "--quiet")
    ocd(folder, "verify")
    context = RunContext(load_project(folder.config))
    settings, base = context.project.settings.collect, context.base_to_overfit()
    # Plain torch cannot do that where nothing before it has a gradient.
    base.reentrant = False
    reader = reader_of(folder)
    split = context.splits["all"]
    stored = {key: reader.read(key)[:FEW] for key in ("delta", "base_loss", "degenerate", "sample_index")}
    x, y = split.batch(stored["sample_index"].tolist())

    class Task(torch.nn.Module):
        """The base behind the task's own forward pass, under its parameter names."""

        def __init__(self):
            super().__init__()
            self.base = base

        def forward(self, x):
            return context.forward(self.base, x)

    wanted = overfit_loop(
        Task(),
        f"base.{context.layer.name}",
        lambda output, labels: losses(context.task, output, labels),
        x,
        y,
        settings.optimizer,
        settings.lr,
        settings.steps,
    )
    np.testing.assert_allclose(stored["base_loss"], wanted.base_loss.float().numpy(), rtol=1e-3, atol=1e-5)
    telling = torch.from_numpy(~stored["degenerate"]) & (wanted.base_loss > 1e-3)
    assert telling.any()
    gap = (torch.from_numpy(stored["delta"]) - wanted.delta.float()).flatten(1).norm(dim=1)
    assert (gap[telling] <= 1e-3 * wanted.rho[telling].float()).all()


def test_the_documentation_has_the_table():
    # As `python tests/reported.py` prints it.
    assert DOCS.read_text().endswith(f"\n{table()}\n")
    assert len(ALL) == sum(len(group) for group in REPORTS.values())
