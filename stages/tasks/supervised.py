"""The task of a user with a plain supervised problem, declared in `[task]` without a Task class."""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from stages.foundation.config import TaskTable
from stages.foundation.errors import SettingsError, TaskError
from stages.foundation.specs import is_code
from stages.foundation.trees import Tree
from stages.tasks.data import load_npz
from stages.tasks.losses import LOSSES, OTHER, mean_binary_probability, require_one_tensor
from stages.tasks.modules import load_object
from stages.tasks.protocol import Task, combined_by
from stages.tasks.user_code import user_code


class SupervisedTask(Task):
    """A model, a loss and data files (or Datasets), each named by a setting.

    Raises:
        SettingsError: an unknown loss.
    """

    def __init__(self, settings: TaskTable, root: Path) -> None:
        self._settings, self._root = settings, root
        loss = settings.loss or ""
        if loss in LOSSES:
            self._loss, kind, self._metrics = LOSSES[loss]
        elif is_code(loss):
            self._loss, kind, self._metrics = _own_loss(root, loss), OTHER, {}
        else:
            raise SettingsError(f"task.loss = {loss!r} is unknown", f'known: {", ".join(LOSSES)}, or "mymodel:my_loss"')
        self.kind = settings.kind or kind

    def model(self) -> nn.Module:
        """The user's model."""
        spec = self._settings.model or ""
        make = load_object(self._root, spec, "task.model")
        if isinstance(make, nn.Module):
            raise TaskError(
                f"task.model = {spec!r} is a model already ({type(make).__name__}), expected what makes one",
                "name its class, or a function: def make(): return Net()",
            )
        with user_code(spec):
            return make(**self._settings.model_args)

    def loss(self, output: Tree, y: Tree) -> Tensor:
        """The loss that `task.loss` names.

        Raises:
            TaskError: a built-in one, and an output of several tensors.
        """
        if self._metrics:
            require_one_tensor(output, f"task.loss = {self._settings.loss!r}")
        return self._loss(output, y)

    def metrics(self, output: Tree, y: Tree) -> dict[str, Tensor]:
        """Those of the built-in loss, or of the kind."""
        if not self._metrics:
            return {"loss": self.loss(output, y)} | (super().metrics(output, y) if self.kind != OTHER else {})
        return {name: metric(output, y) for name, metric in self._metrics.items()}

    def combine(self, outputs: Tree) -> Tree:
        """By kind; logits of a binary classifier by their mean probability."""
        if self._settings.loss == "binary_cross_entropy":
            return combined_by(mean_binary_probability, outputs)
        return super().combine(outputs)

    def train(self) -> Any:
        """The data of `task.train`."""
        return self._train

    def test(self) -> Any:
        """The data of `task.test`."""
        return self._load("test")

    def validation(self) -> Any | None:
        """The data of `task.validation`, if set."""
        return None if self._settings.validation is None else self._load("validation")

    @cached_property
    def _train(self) -> Any:
        return self._load("train")

    def _load(self, role: str) -> Any:
        spec = getattr(self._settings, role)
        if not is_code(spec):
            return load_npz(self._root / Path(spec).expanduser(), labels=True)
        found = load_object(self._root, spec, f"task.{role}")
        if isinstance(found, type) or (callable(found) and not hasattr(found, "__len__")):
            with user_code(spec):
                return found()
        return found


def _own_loss(root: Path, spec: str) -> Callable[[Tree, Tree], Tensor]:
    loss = load_object(root, spec, "task.loss")
    if isinstance(loss, type):
        raise TaskError(
            f"task.loss = {spec!r} is a class, expected a function of (output, y), or an instance",
            f'in mymodel.py: my_loss = {loss.__name__}(reduction="none"); then task.loss = "mymodel:my_loss"',
        )
    if not callable(loss):
        raise TaskError(f"task.loss = {spec!r} is {type(loss).__name__}, expected a function of (output, y)", "name a function")
    return loss
