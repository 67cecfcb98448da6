"""Whether a sample is the same alone as in any batch: its output, and its loss."""

import torch
from torch import Tensor, nn

from stages.foundation.errors import TaskError
from stages.foundation.seeds import generator, global_seed
from stages.foundation.trees import Tree, batch_size, leaves, take, to_device, tree_map
from stages.per_sample.single_precision import tolerance_of
from stages.tasks.data import Split
from stages.tasks.loader import forward, losses, naming_rows
from stages.tasks.protocol import Task

# Samples to a batch: few, because one may be large.
FEW = 4
# Rows that those which are tried are drawn from.
DRAWN = 64
MIXES = "OCD needs a model whose samples do not interact; normalise with running statistics, not the batch's"
LOOKS_ACROSS = "a sample's loss must follow from its own output and label: no mean, sum, ranking or pairs over the batch"
# Losses are computed twice from the same outputs: only the order of sums differs.
LOSS_TOLERANCE = 1e-3


def device_of(model: nn.Module) -> torch.device:
    """Where a model's parameters are."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def check_independent(task: Task, model: nn.Module, split: Split) -> None:
    """Compare rows drawn from the whole split, alone and in two different batches.

    Args:
        task: gives forward pass and loss.
        model: in eval mode.
        split: of at least two rows.

    Raises:
        TaskError: the model is random or keeps a state, or the model or the loss mixes samples.
    """
    rows, device = telling_rows(split), device_of(model)
    for number, batch in enumerate((rows[:FEW], [*rows[FEW:], *rows[1::-1]])):
        x, y = (to_device(tree, device) for tree in split.batch(batch))
        # A copy for each pass: the model may work in place on what it is given.
        output = forward(task, model, tree_map(torch.clone, x))
        if number == 0:
            _check_repeatable(task, model, x, output, passes=1)
        names = [f"{split.name}[{int(split.rows[row])}]" for row in batch]
        with naming_rows(split, batch):
            values = losses(task, output, y)
        try:
            for row, name in enumerate(names):
                check_row(task, model, x, y, output, values, row, name)
        except TaskError:
            # A model that is seldom random is not to be blamed for mixing.
            _check_repeatable(task, model, x, output, passes=8)
            raise


def check_row(task: Task, model: nn.Module, x: Tree, y: Tree, output: Tree, values: Tensor, row: int, name: str) -> None:
    """Compare one sample of a batch with itself alone.

    Args:
        task: gives forward pass and loss.
        model: in eval mode.
        x: inputs; y: labels; output: the model's, each (B, …).
        values: losses (B,).
        row: which of them.
        name: what it is called.

    Raises:
        TaskError: its output or its loss is another in the batch.
    """
    place = slice(row, row + 1)
    _compare_output(task, model, take(x, place), output, row, name)
    _compare_loss(task, output, y, values, row, name)


def telling_rows(split: Split) -> list[int]:
    """Six rows, or as many as there are, of 64 drawn with a seed: those which are filled with numbers other than zero least,
    most, and in between, so that padded ones differ in length; the first two the most."""
    drawn = torch.randperm(len(split), generator=generator("independence", len(split)))[:DRAWN].tolist()

    def filled(row: int) -> int:
        found = leaves(split.inputs([row])).values()
        return sum(int(torch.isfinite(leaf).logical_and(leaf != 0).sum()) for leaf in found)

    ordered = sorted(drawn, key=filled)
    places = [0, 1, 0.5, 0.25, 0.75, 0.9]
    return list(dict.fromkeys(ordered[round(place * (len(ordered) - 1))] for place in places))


def _check_repeatable(task: Task, model: nn.Module, x: Tree, output: Tree, passes: int) -> None:
    """Further passes over one batch must come to the same."""

    def again(*seed: str) -> Tree:
        if not seed:
            return forward(task, model, tree_map(torch.clone, x))
        with global_seed(*seed):
            return forward(task, model, tree_map(torch.clone, x))

    difference = max(_difference(output, again()) for _ in range(passes))
    if difference <= tolerance_of(model):
        return
    seeded = _difference(again("independence"), again("independence"))
    random = seeded <= tolerance_of(model)
    raise TaskError(
        f"the model {'is random' if random else 'keeps a state between passes'} in eval mode: "
        f"passes over one batch differ by {difference:.3g} of the largest output",
        "use F.dropout(…, training=self.training), and draw nothing in eval mode"
        if random
        else "let forward() change nothing of the model, and draw nothing from generators of its own, in eval mode",
    )


def _difference(one: Tree, other: Tree) -> float:
    """The largest difference of two outputs, as a share of the largest number of each tensor (of 1 where that is smaller)."""
    found = [0.0]
    for path, leaf in leaves(one).items():
        twin = leaves(other).get(path)
        if twin is None or twin.shape != leaf.shape:
            return float("inf")
        if leaf.numel():
            gap = (leaf.double() - twin.double()).abs().nan_to_num(0)
            found.append(float(gap.max() / (1 + leaf.double().abs().nan_to_num(0).max())))
    return max(found)


def _compare_output(task: Task, model: nn.Module, x: Tree, output: Tree, row: int, name: str) -> None:
    """One sample, alone as x (1, …), against its row of a batch's output; batched and single products differ by rounding."""
    count = batch_size(output)
    try:
        single = forward(task, model, tree_map(torch.clone, x))
    except TaskError as error:
        if error.__cause__ is None:
            # Nothing was raised: what it returned is the fault.
            raise
        raise TaskError(
            f"the model mixes samples in eval mode: it takes a batch of {count}, but not a sample alone: {error.message}", MIXES
        ) from error
    found = leaves(output)
    for path, leaf in leaves(single).items():
        whole = found.get(path)
        if whole is None or whole.shape[1:] != leaf.shape[1:]:
            batched = "none" if whole is None else tuple(whole.shape[1:])
            raise TaskError(
                f"the model mixes samples in eval mode: {name} alone has an output of shape {tuple(leaf.shape[1:])}, "
                f"in a batch of {count} {batched}: it trims or pads to the longest of a batch",
                "pad to one length for all samples",
            )
        gap = (whole[row].double() - leaf[0].double()).abs().nan_to_num(0)
        if gap.numel() and gap.max() > tolerance_of(model) * (1 + whole.double().abs().nan_to_num(0).max()):
            place = gap.flatten().argmax()
            alone, batched = (float(value.flatten()[place]) for value in (leaf[0], whole[row]))
            raise TaskError(
                f"the model mixes samples in eval mode: an output of {name} is {alone:.6g} alone, "
                f"and {batched:.6g} in a batch of {count}",
                MIXES,
            )


def _compare_loss(task: Task, output: Tree, y: Tree, values: Tensor, row: int, name: str) -> None:
    """The loss of one sample's output alone, against its entry of the batch's; the output is the same."""
    count, place = len(values), slice(row, row + 1)
    broadcast = _broadcast(output, y)
    cause, hint = (f"; {broadcast[0]}", broadcast[1]) if broadcast else ("", LOOKS_ACROSS)
    try:
        alone = losses(task, take(output, place), take(y, place))[0]
    except TaskError as error:
        raise TaskError(
            f"the loss looks across the batch: it takes a batch of {count}, but not a sample alone{cause}: {error.message}",
            hint,
        ) from error
    gap = (alone.double() - values[row].double()).abs()
    # Where both are not finite, nothing can be told; where one is, they differ.
    differs = gap > LOSS_TOLERANCE * (alone.abs() + values[row].abs()) + 1e-6 if gap.isfinite() else True
    if differs and (alone.isfinite() or values[row].isfinite()):
        raise TaskError(
            f"the loss looks across the batch: of {name} it is {float(alone):.6g} alone, "
            f"and {float(values[row]):.6g} in a batch of {count}{cause}",
            hint,
        )


def _broadcast(output: Tree, y: Tree) -> tuple[str, str] | None:
    """Whether output and labels have shapes that together make a table of all pairs of samples, and what to do about it."""
    for path, leaf in leaves(output).items():
        for label in leaves(y).values():
            shapes = tuple(leaf.shape), tuple(label.shape)
            if shapes[0] == shapes[1] or abs(len(shapes[0]) - len(shapes[1])) != 1:
                continue
            longer, shorter = sorted(shapes, key=len, reverse=True)
            if longer == (*shorter, 1):
                larger = tuple(torch.broadcast_shapes(*shapes))
                what = f"the output{path and f' {path}'} {shapes[0]} beside y {shapes[1]} is broadcast to {larger}"
                return what, "give both one shape: output.squeeze(-1) or y.unsqueeze(-1)"
    return None
