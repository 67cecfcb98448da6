"""What to do after an evaluation."""

import shlex

from stages.evaluation import rows as row
from stages.evaluation.verdict import HELPS, UNDECIDED, Verdict

# OCD's own rows that the verdict on its ensemble speaks for.
AS_THE_VERDICT_SAYS = (row.ENSEMBLE, row.ONE_DRAW, row.NO_SCALING, row.MEAN_NETWORK)


def advice(
    found: Verdict,
    best: str | None,
    *,
    longer: str,
    flags: str = "",
    weak: bool = False,
    untried: bool = False,
    by_paper: bool = False,
) -> str:
    """What to do next, in a sentence.

    Args:
        best: the row that validation favours, where that is known; `base` where none gains enough.
        longer: the command that trains the base as the row of the longer base was.
        weak: whether the base is worse than a constant.
        flags: what every command has to repeat.
        untried: a plain network was not tried, and a sample is one row, of which changing weights says no more than changing
            the output.
        by_paper: the denoiser was trained by the paper's objective alone.
    """
    with_best = f"predict with the row of the lowest validation loss, {best}: ocd infer --row auto{flags}"
    spoken_for = best in (None, row.BASE, *AS_THE_VERDICT_SAYS)
    if weak:
        return "mend the base first, which is worse than a constant; train-base says how"
    if found.absent and best is None:
        return "give validation samples with task.validation, and evaluate again"
    if found.rival == row.LONGER:
        # On validation samples the longer base is judged, too.
        if spoken_for or best == row.LONGER:
            return f"train the base longer first: {longer}; and keep what it sets in ocd.toml"
        return f"{with_best}; or train the base longer: {longer}"
    if found.outcome == UNDECIDED and not found.absent:
        return "evaluate on more test samples" + ("" if spoken_for else f"; until then {with_best}")
    if not spoken_for:
        return with_best
    return _without_a_best_row(found, flags, untried=untried, by_paper=by_paper)


def _without_a_best_row(found: Verdict, flags: str, *, untried: bool, by_paper: bool) -> str:
    """Where validation samples favour nothing beyond what the verdict speaks for."""
    if found.rival_gains and row.predicts(found.rival):
        return f"predict with what has the gain: ocd infer --row {shlex.quote(found.rival)}{flags}"
    # Where there are validation samples, a row is absent for outputs of this form have none such: nothing is to be given.
    if found.outcome != HELPS and not found.absent:
        by_task = f"ocd run --from train-scale --force{flags}, and evaluate again"
        more = f'; or train OCD by the task\'s own loss: write objective = "task" under [train-diffusion], then {by_task}'
        return "use the base as it is" + (more if by_paper else "")
    ask = f"ocd evaluate --add {shlex.quote(row.PLAIN)}{flags}"
    return f"predict with: ocd infer{flags}" + (
        f"; a plain network may do as much where a sample is one row: {ask}" if untried else ""
    )
