"""Figures are said with the number of samples that they are of, and with no more than these tell."""

from ocd_cli.render import show_result
from stages.lifecycle.results import CommandResult


def said(finished_run, capsys, stage, leave_out=(), **changed):
    """What is printed of a stage's summary, with some of it changed, or left out as in runs of before."""
    summary = {key: value for key, value in {**finished_run.summary(stage), **changed}.items() if key not in leave_out}
    show_result(CommandResult(stage, summary, path=finished_run.run / stage))
    return capsys.readouterr().out


def test_the_base(finished_run, capsys):
    shown = said(finished_run, capsys, "train-base")
    assert "│ validation (4 samples) │" in shown
    assert "│ test (24 samples)      │" in shown
    shown = said(finished_run, capsys, "train-base", validation_samples=1, warnings=["one", "two"])
    assert "│ validation (1 sample) │" in shown
    assert "\nwarning: one\nwarning: two\ntrain-base: done (" in shown
    shown = said(finished_run, capsys, "train-base", ("validation_samples", "test_samples", "warnings"))
    assert "│ validation │" in shown


def test_the_deltas(finished_run, capsys):
    assert "\nmean loss of 36 training samples: " in said(finished_run, capsys, "collect")
    assert "\nmean loss of 35 held-out samples: " in said(finished_run, capsys, "collect", split="validation", skipped=[3])
    assert "\nmean loss of 36 samples: " in said(finished_run, capsys, "collect", split="all")
    assert "\nmean loss of 36 training samples: " in said(finished_run, capsys, "collect", ("split",))


def test_the_scale(finished_run, capsys):
    assert finished_run.summary("train-scale")["correlation"] is None
    assert all(abs(row["correlation"]) <= 1 for row in finished_run.read("train-scale/metrics.jsonl"))
    shown = said(finished_run, capsys, "train-scale")
    assert shown.startswith("scale: too few held-out samples (2) for a correlation; error ")
    shown = said(finished_run, capsys, "train-scale", correlation=0.5, held_out_samples=1200)
    assert shown.startswith("scale: correlation of log rho 0.5 over 1,200 held-out samples; error ")
    shown = said(finished_run, capsys, "train-scale", ("held_out_samples",), correlation=0.5)
    assert shown.startswith("scale: correlation of log rho 0.5; error ")


LOSS = "(mean over all noise levels; where the noise is weak, the denoiser sees most of the delta)"
NOTHING = "the denoiser has learned little or nothing from the conditioning: expect no gain\n"


def test_the_denoiser(finished_run, capsys):
    figures = {"held_out_loss": 0.3, "cosine": -0.01, "cosine_shuffled": 0.02}
    shown = said(finished_run, capsys, "train-diffusion", **figures)
    loss, cosines, told, _ = shown.splitlines()[1:]
    assert loss == f"held-out loss 0.3 of 2 samples {LOSS}"
    assert cosines == (
        "cosine of a generated delta with the true one -0.01, with another sample's conditioning 0.02, of 2 held-out samples"
    )
    assert told == "2 held-out samples do not tell whether a sample's own conditioning is used"
    many = {"held_out_samples": 512, "cosine_samples": 64}
    shown = said(finished_run, capsys, "train-diffusion", **many, uses_conditioning=False)
    assert " of 512 samples (mean " in shown
    assert f", of 64 held-out samples\n{NOTHING}" in shown
    shown = said(finished_run, capsys, "train-diffusion", **many, uses_conditioning=True)
    assert ", of 64 held-out samples\ntrain-diffusion: done (" in shown
    assert "(1 is knowing nothing)\n" in said(finished_run, capsys, "train-diffusion", prediction="mean")
    shown = said(
        finished_run, capsys, "train-diffusion", ("held_out_samples", "cosine_samples", "uses_conditioning"), **figures
    )
    assert f"held-out loss 0.3 {LOSS}\n" in shown
    assert "conditioning 0.02\ntrain-diffusion: done (" in shown
