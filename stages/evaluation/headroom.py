"""What a probe's trials say: is there headroom, and does x tell anything about it?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stages.evaluation.rows import BASE, MEAN_DELTA, ORACLE
from stages.evaluation.statistics import Estimate
from stages.evaluation.verdict import NEIGHBOURS

NONE, LABELS, X = "none", "labels", "x"


@dataclass(frozen=True)
class Trial:
    """One layer with settings of `[collect]` on held-out samples: each row's loss, over the same resamples, and its name."""

    layer: str
    settings: Mapping[str, Any]
    metric: str
    losses: Mapping[str, Estimate]

    def gains(self, name: str, over: str) -> bool:
        """Whether the whole paired 95 % interval of a row's loss is below another row's."""
        return self.losses[name].minus(self.losses[over])[1][1] < 0

    @property
    def neighbour(self) -> str:
        """The best of the neighbours' rows."""
        return min((name for name in NEIGHBOURS if name in self.losses), key=lambda name: self.losses[name].value)

    @property
    def gains_by_x(self) -> bool:
        """Whether neighbours' deltas gain over the base, and more than the one delta that all samples could be given."""
        return self.gains(self.neighbour, BASE) and self.value(self.neighbour) < self.value(MEAN_DELTA)

    def value(self, name: str) -> float:
        return self.losses[name].value


def headroom(trials: Sequence[Trial]) -> dict[str, Any]:
    """The verdict over all trials: no headroom; headroom that only labels reach; or headroom for x, and where to start.

    Headroom: overfitting held-out samples on their own labels lowers their loss (paired 95 % interval). For x: so does the
    delta of the nearest training samples, and by more than the mean delta.

    Returns:
        {"verdict", "headroom", "start_with"}.
    """
    with_x = [trial for trial in trials if trial.gains_by_x]
    with_labels = [trial for trial in trials if trial.gains(ORACLE, BASE)]
    if with_x:
        best = _gentlest(min(with_x, key=lambda trial: trial.value(trial.neighbour)), with_x)
        text = (
            f"headroom for x: on {best.layer} the delta of the {best.neighbour} takes {best.metric} from "
            f"{best.value(BASE):.4f} to {best.value(best.neighbour):.4f}, the true label's to {best.value(ORACLE):.4f}; "
            "start with this layer and these settings"
        )
        return {"verdict": text, "headroom": X, "start_with": _start(best)}
    if not with_labels:
        best = min(trials, key=lambda trial: trial.value(ORACLE))
        text = f"no headroom: {_figures(best)}; a larger collect.lr or more collect.steps may show some"
        return {"verdict": text, "headroom": NONE, "start_with": {}}
    best = min(with_labels, key=lambda trial: trial.value(trial.neighbour))
    text = (
        f"no headroom for x in sight: on {best.layer} {_figures(best)}, {best.value(best.neighbour):.4f} with those of the "
        f"{best.neighbour}: not beyond chance (95 % interval), or no more than the mean delta gains"
    )
    return {"verdict": text, "headroom": LABELS, "start_with": {}}


def _figures(trial: Trial) -> str:
    return f"{trial.metric} {trial.value(BASE):.4f}, {trial.value(ORACLE):.4f} with the deltas of the true labels"


def _gentlest(best: Trial, others: Sequence[Trial]) -> Trial:
    """Of the settings that do as well on the same layer (paired 95 % interval), those that overfit least: a strength can make
    more of a small delta, but few samples do not show how wrong a large one may go."""

    def does_as_well(trial: Trial) -> bool:
        return trial.losses[trial.neighbour].minus(best.losses[best.neighbour])[1][0] <= 0

    same = [trial for trial in others if trial.layer == best.layer and does_as_well(trial)]
    return max(same, key=lambda trial: trial.value(ORACLE), default=best)


def _start(trial: Trial) -> dict[str, Any]:
    return {"select-layer.layer": trial.layer, **{f"collect.{key}": value for key, value in trial.settings.items()}}
