"""What the summary of a denoiser's training says beside its losses."""

from typing import Any

from stages.diffusion.denoising import SAMPLED_ROWS, uses_conditioning
from stages.foundation.progress import Report
from stages.run_directory.pipeline import AUTO
from stages.training.batches import TrainingBatches
from stages.training.plan import Trained


def of_tuning(trained: Trained, after: int | str, report: Report) -> dict[str, Any]:
    """Of a training that is tuned `after` so many steps (0: it is not): the task's loss, on how many samples, and after which
    step tuning began; None where no step was tuned, which is reported."""
    if not after:
        return {}
    began = trained.tuned_from if after == AUTO else after
    if began is None or began >= trained.steps:
        report.message(
            f"nothing is tuned: by step {trained.steps:,} it had not begun; go on with a larger "
            "--set train-diffusion.max_steps=N, or name the step with --set train-diffusion.tune_after=N"
        )
        began = None
    judged = trained.best.get("judged_samples")
    return {"held_out_task_loss": trained.best["score"], "judged_samples": judged, "tuned_from": began}


def of_conditioning(best: dict[str, Any], batches: TrainingBatches) -> dict[str, Any]:
    """How many samples the cosines are of, and whether these tell that a sample's own conditioning is used."""
    rows, samples = len(batches.held_out), batches.held_out_samples
    compared = min(rows, SAMPLED_ROWS) * samples // rows
    # A checkpoint of before has no error; of several rows a sample, all of them may say the same.
    own, shuffled, error = (best.get(name) for name in ("cosine", "cosine_shuffled", "cosine_error"))
    known = None not in (own, shuffled, error)
    used = uses_conditioning(own - shuffled, error * (rows / samples) ** 0.5, compared) if known else None
    return {"cosine_samples": compared, "uses_conditioning": used}
