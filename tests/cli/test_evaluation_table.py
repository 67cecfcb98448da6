"""The table of evaluate as people see it: no figure is cut, however narrow the terminal."""

import io

import pytest
from rich.console import Console

from ocd_cli.tables import show_evaluation
from stages.evaluation.rows import TABLE

LOSSES = {
    "usual": (0.1194, 0.02, -0.0076, (-0.0112, -0.0037)),
    "raw targets": (27211.4, 571.2, -24758.1, (-28810.3, -22614.9)),
    "diverged": (2.384e20, 2.4e20, 2.384e20, (-1.234e19, 7.1e20)),
    "tiny": (1.234e-12, 9.9e-13, -3.4e-13, (-1.23e-12, 2.34e-13)),
}


def shown(losses, width):
    mean, error, difference, interval = losses
    metrics = {"loss": {"mean": mean, "standard_error": error, "difference": difference, "interval": list(interval)}}
    rows = [{"name": name, "members": 5, "strength": 0.25, "validated": True, "metrics": metrics} for name in TABLE]
    names = ("generated_true", "generated_nearest", "generated_mean", "true_nearest", "training_nearest")
    found = {
        "metric": "loss",
        "rows": rows,
        "samples": 600,
        "validation_samples": 120,
        "left_out": [],
        "warnings": [],
        "verdict": "OCD helps",
        "next": "predict with: ocd infer",
        "seed": 0,
        "memorisation": {**dict.fromkeys(names, 0.5), "copies": 0.0},
        "cost": {
            "base_ms": 0.1,
            "ocd_one_draw_ms": 0.2,
            "ocd_ensemble_ms": 0.3,
            "parameters": {"base": 10, "denoiser": 20},
            "stage_seconds": {"collect": 1.0},
        },
    }
    out = io.StringIO()
    show_evaluation(Console(width=width, file=out, markup=False, highlight=False), found)
    return out.getvalue()


@pytest.mark.parametrize("width", [80, 100, 180])
@pytest.mark.parametrize("name", LOSSES)
def test_every_figure_is_there_whole(name, width):
    text = shown(LOSSES[name], width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    expected = {
        "usual": ("0.1194 ± 0.02", "-0.0076", "[-0.0112, -0.0037]"),
        "raw targets": ("27,211 ± 5.7e+02", "-24,758", "[-28,810, -22,615]"),
        "diverged": ("2.384e+20 ± 2.4e+20", "+2.38e+20", "[-1.23e+19, +7.1e+20]"),
        "tiny": ("1.234e-12 ± 9.9e-13", "-3.4e-13", "[-1.23e-12, +2.34e-13]"),
    }[name]
    for figures in expected:
        # In each row but the base's, whose difference to itself is not shown.
        assert text.count(figures) >= len(TABLE) - 1, figures
