"""The Task: everything `ocd` asks of a problem. Only the first four methods have no default."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stages.foundation.errors import DataError, TaskError
from stages.foundation.trees import Tree, leaves, tree_map
from stages.tasks.losses import (
    CLASSIFICATION,
    OTHER,
    REGRESSION,
    LabelError,
    accuracy,
    cross_entropy,
    mae,
    mean_binary_probability,
    mean_output,
    mean_probability,
    mse,
    require_one_tensor,
)


def _mean_probability(outputs: Tensor) -> Tensor:
    """Of logits of several classes (E, B, C, …), or of a binary classifier's (E, B) or (E, B, 1)."""
    binary = outputs.dim() == 2 or outputs.shape[2:] == (1,)
    return mean_binary_probability(outputs) if binary else mean_probability(outputs)


def combined_by(mean: Callable[[Tensor], Tensor], outputs: Tree) -> Tree:
    """`mean` of each floating-point tensor (E, B, …) of an output; None in place of others."""
    return tree_map(lambda leaf: mean(leaf) if leaf.is_floating_point() or leaf.is_complex() else None, outputs)


class Task:
    """A problem: data splits, a base model, a loss per sample. Subclass it and name it with `[task] class = "task:MyTask"`.

    x and y are tensors, or tuples or dicts of them; B is a batch's number of samples.
    """

    kind: str = OTHER
    # Whether x is a field of the conditioning, too: set from `[collect] condition_on_x`.
    condition_on_x: bool = False
    # Further submodules of the model, by name, whose outputs are fields of the conditioning, too.
    watched: Sequence[str] = ()

    def model(self) -> nn.Module:
        """The base network, freshly made."""
        raise NotImplementedError

    def train(self) -> Any:
        """The training set: anything with a length whose items are pairs (x, y)."""
        raise NotImplementedError

    def test(self) -> Any:
        """The test set."""
        raise NotImplementedError

    def loss(self, output: Tree, y: Tree) -> Tensor:
        """One loss per sample, (B,)."""
        raise NotImplementedError

    def validation(self) -> Any | None:
        """The validation set, or None: a seeded part of the training set is then held out."""
        return None

    def forward(self, model: nn.Module, x: Tree) -> Tree:
        """The model's output for a batch.

        Raises:
            TaskError: x is a tuple or dict, and the model takes its parts one by one.
        """
        try:
            return model(x)
        except TypeError as error:
            if isinstance(x, Tensor) or "argument" not in str(error):
                raise
            raise TaskError(
                f"model(x) gets x as one argument, a {type(x).__name__} of {len(leaves(x))}: {error}",
                "write a Task class whose forward() calls model(*x), or model(**x) for a dict",
            ) from error

    def metrics(self, output: Tree, y: Tree) -> dict[str, Tensor]:
        """Figures to report, each (B,). By kind: cross-entropy and accuracy, mse and mae, or the loss."""
        by_kind = {CLASSIFICATION: {"cross_entropy": cross_entropy, "accuracy": accuracy}, REGRESSION: {"mse": mse, "mae": mae}}
        found = by_kind.get(self.kind, {"loss": self.loss})
        if self.kind in by_kind:
            require_one_tensor(output, f"kind = {self.kind!r}, which scores by {' and '.join(found)},")
        try:
            return {name: metric(output, y) for name, metric in found.items()}
        except LabelError:
            raise
        except DataError as error:
            raise TaskError(
                f"kind = {self.kind!r} scores by {' and '.join(found)}, which do not fit: {error.message}",
                "leave kind out: outputs are scored by the loss then; or give a Task class metrics() of its own",
            ) from error

    def combine(self, outputs: Tree) -> Tree:
        """An ensemble's outputs (E, B, …) as one (B, …): the log of the mean probability (its logit, where there is one number
        a sample), or the mean. Entries that hold integers have no mean and become None."""
        return combined_by(_mean_probability if self.kind == CLASSIFICATION else mean_output, outputs)

    def view(self, x: Tree, y: Tree, generator: torch.Generator) -> tuple[Tree, Tree]:
        """The part of one sample (no batch axis) used at one gradient step of overfitting; by default all of it."""
        return x, y

    def glance(self, x: Tree, y: Tree, generator: torch.Generator) -> tuple[Tree, Tree]:
        """The part of one sample (no batch axis) used at one step of training the denoiser by the task's loss; by default as
        `view`. Where a sample is many rows, few rows of many samples teach more than many rows of few."""
        return self.view(x, y, generator)

    def conditioning(self, x: Tree, output: Tree, captured: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """Named fields (B, …) in place of I(x) = [layer_input, activation, base_output], or None for those three.

        `captured` holds the three fields, and those of `watched`, as the model has them: neither reduced nor pooled.
        """
        return None

    def reduce(self, name: str, tensor: Tensor) -> Tensor | None:
        """A form (B, …) of your own for a conditioning field, or None: it is kept, or pooled by its mean where it is wider
        than 4,096 numbers."""
        return None

    def picture(self, x: Tree, output: Tree) -> Tensor | None:
        """A picture (H, W, 3) or (H, W) in [0, 1] of one sample's output (no batch axis), for people to look at; also given y
        in place of an output, for the pane of the truth. By default none."""

    def coordinates(self, x: Tree) -> Tensor | None:
        """Where inputs lie, (B, d), for the rows that look up the nearest training samples; None: at their own numbers."""
        return None

    def extra_rows(self, model: nn.Module, train: Any, validation: Any, **options: Any) -> dict[str, Callable[[Tree], Tree]]:
        """Further rows for `evaluate`: a name to a function from inputs (B, …) to outputs (B, …).

        `model` is the base, in eval mode; `train` and `validation` are splits: `split.batch(positions)` is (x, y). `options`
        holds `seed` and `device`, where inputs are and outputs must be. `ocd infer --row auto` takes the row that is best on
        validation: one that was fitted on it looks better than it is.
        """
        return {}

    def train_base(self, model: nn.Module, train: Any, validation: Any, **options: Any) -> None:
        """Train `model` in place; when a task defines this, the default trainer is not used.

        `options` holds `seed`, `device`, the settings of `[train-base]`, and `report`, which may be told of progress:
        `report.progress(done, total, "steps", loss=0.5)`, `report.message("one line")`.
        """
        raise NotImplementedError


def uses_default(task: Task, method: str) -> bool:
    """Whether a task has not defined a method of its own."""
    return getattr(type(task), method) is getattr(Task, method)
