"""The metrics of a row: what each sample contributes, gathered batch by batch, and the figures made of it."""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stages.evaluation.statistics import Auroc, CalibrationError, Mean, RootMean, Statistic, minimum
from stages.foundation.no_doubles import where_doubles_are
from stages.foundation.trees import Tree, batch_size, take
from stages.tasks.classes import OF_CLASSES, class_probabilities, logits_of
from stages.tasks.loader import losses
from stages.tasks.losses import CLASSIFICATION, REGRESSION
from stages.tasks.protocol import Task
from stages.tasks.scoring import metrics_of

LOSS = "loss"
# Half the width of a Gaussian's 95 % interval, in standard deviations.
NORMAL_95 = 1.959964
SMALLEST_VARIANCE, GRID_STEPS = 1e-30, 50
# Mutual information below this is rounding.
ROUNDING = 1e-12
OURS = ("brier_score", "calibration_error", "auroc_of_confidence", "auroc_of_disagreement")
FINDERS, OF_VARIANCE = OURS[2:], ("log_likelihood", "coverage")
ONE_MEMBER = "its prediction has one member"


def probabilities(output: Tree, y: Tree) -> tuple[Tensor, Tensor] | None:
    """Class probabilities and class numbers of a classifier's predictions, or None where output and labels have another form.

    Args:
        output: logits (B, C, …) beside class numbers (B, …); or logits of a binary classifier beside 0/1 labels of as many
            numbers. Probabilities as labels, and class numbers that there are no logits of, are another form.
        y: the labels.

    Returns:
        (B, C, P) and (B, P), P predictions a sample.
    """
    form = logits_of(output, y)
    if form is None:
        return None
    labels = y if form == OF_CLASSES else y > 0.5
    return class_probabilities(output, form), labels.reshape(len(y), -1).long()


def disagreement(members: Tensor) -> Tensor:
    """Mutual information of prediction and member, H(mean p) − mean H(p), in nats: (E, B, C, P) to (B,), the mean over P."""
    mean = members.mean(0)
    entropy = [-(p * p.clamp_min(1e-300).log()).sum(-2) for p in (mean, members)]
    return (entropy[0] - entropy[1].mean(0)).mean(-1)


@dataclass
class Gathered:
    """What the samples of a row contribute, as batches come in.

    Attributes:
        variance: of a regression's residual, fitted on other samples; None where it is not known.
        parts: name to arrays, one a batch, (B, …).
        missing: metrics that have no value, with the reason.
    """

    task: Task
    variance: float | None = None
    parts: dict[str, list[np.ndarray]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    members: int = 0

    def add(self, members: Tree, output: Tree, y: Tree) -> None:
        """A batch: members (E, B, …), their combination (B, …) and the labels (B, …). A metric of the task comes before one of
        ours of the same name, but for `loss`, which is the task's loss."""
        self.members = batch_size(members)
        for name, values in metrics_of(self.task, output, y).items():
            if name != LOSS:
                self._keep(name, values)
        self._keep(LOSS, losses(self.task, output, y))
        members, output, y = map(where_doubles_are, (members, output, y))
        if self.task.kind == CLASSIFICATION:
            self._classification(members, output, y)
        elif self.task.kind == REGRESSION:
            self._regression(members, output, y)

    def joined(self, other: "Gathered") -> "Gathered":
        """The same row on these samples and on others; what one of them has no value for has none."""
        parts = {name: [*mine, *other.parts[name]] for name, mine in self.parts.items() if name in other.parts}
        return Gathered(self.task, self.variance, parts, self.missing | other.missing, self.members)

    def _keep(self, name: str, values: Tensor) -> None:
        self.parts.setdefault(name, []).append(values.detach().double().cpu().numpy())

    def _classification(self, members: Tree, output: Tree, y: Tree) -> None:
        found = None if OURS[0] in self.missing else probabilities(output, y)
        if found is None:
            self.missing |= dict.fromkeys(OURS, "outputs and labels are not logits and class numbers")
            # What earlier batches gave would be of other samples than the rest.
            self.parts = {name: parts for name, parts in self.parts.items() if not name.endswith("*")}
            return
        p, labels = found
        true = F.one_hot(labels, p.shape[1]).transpose(1, 2)
        confidence, guess = p.max(1)
        correct = (guess == labels).double()
        self._keep("accuracy*", correct.mean(1))
        self._keep("cross_entropy*", -(p * true).sum(1).clamp_min(1e-300).log().mean(1))
        self._keep("brier_score*", (p - true).square().sum(1).mean(1))
        self._keep(
            "gaps*",
            torch.from_numpy(CalibrationError.of(*(part.detach().cpu().numpy() for part in (confidence, correct))).gaps),
        )
        if p.shape[2] > 1:
            self.missing |= dict.fromkeys(FINDERS, "a sample has several predictions")
            return
        self._keep("wrong*", 1 - correct[:, 0])
        self._keep("auroc_of_confidence*", -confidence[:, 0])
        if self.members == 1:
            self.missing["auroc_of_disagreement"] = ONE_MEMBER
            return
        of_members = [probabilities(take(members, member), y) for member in range(self.members)]
        self._keep("auroc_of_disagreement*", disagreement(torch.stack([one[0] for one in of_members])))

    def _regression(self, members: Tree, output: Tree, y: Tree) -> None:
        residual, variance = _residuals(members, output, y)
        if residual is None:
            self.missing |= dict.fromkeys(("rmse", "mae", *OF_VARIANCE), "outputs and labels have different forms")
            return
        self._keep("squared*", residual.square().mean(1))
        self._keep("mae*", residual.abs().mean(1))
        if self.variance is None:
            self.missing |= dict.fromkeys(OF_VARIANCE, "there are no validation rows to fit a variance on")
            return
        total = variance + self.variance
        self._keep("log_likelihood*", -(0.5 * (2 * math.pi * total).log() + residual.square() / (2 * total)).mean(1))
        self._keep("coverage*", (residual.abs() <= NORMAL_95 * total.sqrt()).double().mean(1))

    def values(self, name: str) -> np.ndarray:
        """What the samples contribute to a metric, (N, …)."""
        return np.concatenate(self.parts[name])

    def statistics(self) -> dict[str, Statistic]:
        """The row's figures by name: the task's metrics and the loss, then those of its kind."""
        found: dict[str, Statistic] = {name: Mean(self.values(name)) for name in self.parts if not name.endswith("*")}
        for name in ("accuracy", "cross_entropy", "brier_score", "mae", *OF_VARIANCE):
            if f"{name}*" in self.parts and name not in found:
                found[name] = Mean(self.values(f"{name}*"))
        if "squared*" in self.parts:
            found.setdefault("rmse", RootMean(self.values("squared*")))
        if "gaps*" in self.parts:
            found.setdefault("calibration_error", CalibrationError(self.values("gaps*")))
        for name in FINDERS:
            if f"{name}*" in self.parts and (statistic := self._finder(name)) is not None:
                found.setdefault(name, statistic)
        return {name: statistic for name, statistic in found.items() if name not in self.missing}

    def _finder(self, name: str) -> Statistic | None:
        """How well a score finds errors; None, with the reason in `missing`, where there is nothing to find, or to find by."""
        wrong, scores = self.values("wrong*") > 0, self.values(f"{name}*")
        if not wrong.any() or wrong.all():
            self.missing[name] = "there are no errors to find" if not wrong.any() else "every prediction is an error"
        elif name == "auroc_of_disagreement" and scores.max() < ROUNDING:
            self.missing[name] = "its members agree"
        else:
            return Auroc(scores, wrong)
        return None


def _residuals(members: Tree, output: Tree, y: Tree) -> tuple[Tensor | None, Tensor | None]:
    """y − f and the members' variance, each (B, P) float64; None where output and labels have different forms."""
    if not isinstance(output, Tensor) or not isinstance(y, Tensor) or output.numel() != y.numel():
        return None, None
    residual = y.double().reshape(len(y), -1) - output.double().reshape(len(y), -1)
    return residual, members.double().var(0, correction=0).reshape(len(y), -1)


@dataclass
class Residuals:
    """Residuals of a regression on validation samples, as batches come in."""

    parts: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    most_numbers = 256

    def add(self, members: Tree, output: Tree, y: Tree) -> None:
        """A batch, as `Gathered.add`; of wide outputs evenly spaced numbers are kept."""
        residual, variance = _residuals(members, output, y)
        if residual is not None:
            step = -(-residual.shape[1] // self.most_numbers)
            self.parts.append((residual[:, ::step].cpu(), variance[:, ::step].cpu()))

    def variance(self) -> float | None:
        """The likeliest variance σ² of N(f, σ² + members' variance); None without samples."""
        if not self.parts:
            return None
        squared, spread = torch.cat([r for r, _ in self.parts]).square(), torch.cat([v for _, v in self.parts])
        most = max(float(squared.mean()), SMALLEST_VARIANCE)
        if not float(spread.max()):
            return most

        def loss(logarithm: float) -> float:
            total = math.exp(logarithm) + spread
            return float((total.log() + squared / total).mean())

        # There may be several minima where members' variances differ much: the best of a coarse grid, then the place beside it.
        low, high = math.log(most) - 12, math.log(max(float(squared.max()), SMALLEST_VARIANCE))
        step = (high - low) / GRID_STEPS
        best = min((low + step * i for i in range(GRID_STEPS + 1)), key=loss)
        return math.exp(minimum(loss, best - step, best + step))
