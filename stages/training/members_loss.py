"""The loss of several members together, by which a denoiser is tuned that is to draw different ones."""

from torch import Tensor

from stages.foundation.trees import Tree
from stages.tasks.loader import losses
from stages.tasks.losses import REGRESSION
from stages.tasks.protocol import Task
from stages.tasks.user_code import user_code

# Added to squares, so that members that coincide have a gradient.
SMALLEST = 1e-12


def members_loss(task: Task, outputs: Tree, y: Tree) -> Tensor:
    """The energy score of members, where they are numbers like the label; else the task's loss of their combination, such as
    the log of their mean probability.

    Args:
        outputs: (m, B, …).

    Returns:
        (B,).
    """
    if has_energy_score(task, outputs, y):
        return energy_score(outputs, y)
    with user_code("combine()"):
        together = task.combine(outputs)
    return losses(task, together, y)


def has_energy_score(task: Task, outputs: Tree, y: Tree) -> bool:
    """Whether members' outputs (m, B, …) can be told from labels by a distance."""
    tensors = isinstance(outputs, Tensor) and isinstance(y, Tensor)
    return task.kind == REGRESSION and tensors and outputs.shape[1:] == y.shape


def energy_score(outputs: Tensor, y: Tensor) -> Tensor:
    """1/m Σ_i ‖f_i − y‖ − 1/(2m(m − 1)) Σ_{i≠j} ‖f_i − f_j‖, with root mean squares for norms: (m, B, …), (B, …) to (B,).

    It is fair: its mean over members drawn from a distribution is that distribution's own score, however few they are (Gneiting
    and Raftery, 2007, Eq. 22; Ferro, 2014), and the least where they are drawn as the label is. Of one member: its distance.
    """
    count = len(outputs)
    score = _size(outputs - y).mean(0)
    if count > 1:
        apart = sum(_size(outputs - outputs.roll(shift, 0)).sum(0) for shift in range(1, count))
        score = score - apart / (2 * count * (count - 1))
    return score


def _size(differences: Tensor) -> Tensor:
    """(m, B, …) to (m, B)."""
    return (differences.reshape(*differences.shape[:2], -1).square().mean(2) + SMALLEST).sqrt()
