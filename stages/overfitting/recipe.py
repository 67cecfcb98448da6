"""How a sample is overfitted, and which settings of it go together."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from stages.foundation.config import CollectTable
from stages.foundation.errors import SettingsError
from stages.foundation.trees import Tree
from stages.tasks.protocol import Task
from stages.tasks.views import has_views

# (output (B, …), y (B, …)) -> (B,)
LossFunction = Callable[[Tree, Tree], Tensor]
# step -> the (x, y) used at it, each (B, …)
Views = Callable[[int], tuple[Tree, Tree]]


@dataclass(frozen=True)
class Recipe:
    """How a sample is overfitted.

    Attributes:
        optimizer: "adam" (β 0.9, 0.999, ε 1e-8) or "sgd".
        lr: learning rate.
        steps: gradient steps, unless until_converged.
        momentum: of sgd.
        weight_decay: of sgd, towards zero as in torch.optim.SGD.
        until_converged: step until the gradient's norm is at most `tolerance` of its first, at most `max_steps` times.
        tolerance: share of the first gradient's norm.
        max_steps: gradient steps at most, if until_converged.
    """

    optimizer: str
    lr: float
    steps: int = 3
    momentum: float = 0.0
    weight_decay: float = 0.0
    until_converged: bool = False
    tolerance: float = 0.1
    max_steps: int = 100

    @property
    def most_steps(self) -> int:
        """The number of steps that no sample exceeds."""
        return self.max_steps if self.until_converged else self.steps

    @property
    def is_one_product(self) -> bool:
        """Whether steps along outer products with one vector add up to one outer product."""
        return self.optimizer == "sgd" and not self.weight_decay


def recipe_of(settings: CollectTable) -> Recipe:
    """How a sample is overfitted, as `[collect]` says."""
    return Recipe(**{field.name: getattr(settings, field.name) for field in dataclasses.fields(Recipe)})


def check_recipe(settings: CollectTable, task: Task) -> None:
    """Refuse settings that do not go together, or not with the task.

    Raises:
        SettingsError: with the reason.
    """
    if settings.optimizer == "adam":
        for key in ("momentum", "weight_decay"):
            if value := getattr(settings, key):
                raise SettingsError(f"collect.{key} = {value} is of sgd, not of adam", "use --set collect.optimizer=sgd")
    if not settings.until_converged:
        for key in ("tolerance", "max_steps"):
            if (value := getattr(settings, key)) != CollectTable.model_fields[key].default:
                raise SettingsError(
                    f"collect.{key} = {value} is of until_converged, which is not set",
                    "use --set collect.until_converged=true, or leave it out",
                )
    if settings.repeats > 1 and not has_views(task):
        raise SettingsError(
            f"collect.repeats = {settings.repeats}: the task has no view(), so every overfit of a sample is the same",
            "leave it out, or draw a part of the sample for each gradient step in view()",
        )
    if settings.store == "factored":
        why = "Adam's steps are none" if settings.optimizer == "adam" else ""
        why = "with weight decay they are none" if settings.weight_decay else why
        if why:
            raise SettingsError(
                f"collect.store = 'factored' needs deltas that are one outer product: {why}",
                "use --set collect.store=dense, or --set collect.optimizer=sgd without weight_decay",
            )
