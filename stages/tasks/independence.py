"""Whether a sample is the same alone as in any batch: its output, and its loss."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from stages.foundation.errors import TaskError
from stages.foundation.seeds import generator, global_seed
from stages.foundation.trees import Tree, batch_size, leaves, take, to_device, tree_map
from stages.per_sample.single_precision import tolerance_of
from stages.tasks.data import ArrayDataset, Split
from stages.tasks.loader import device_of, forward, losses, naming_rows
from stages.tasks.protocol import Task

# Samples to a batch: few, because one may be large.
FEW = 4
# Rows that those which are tried are drawn from: of arrays, and of a dataset, which may be slow.
DRAWN, DRAWN_BY_CODE = 64, 16
MIXES = "OCD needs a model whose samples do not interact; normalise with running statistics, not the batch's"
LOOKS_ACROSS = "a sample's loss must follow from its own output and label: no mean, sum, ranking or pairs over the batch"
# Losses are computed twice from the same outputs: only the order of sums differs.
LOSS_TOLERANCE = 1e-3
# Smaller losses have gradients that count as none.
LOSS_FLOOR = 1e-6
# Rows of a batch whose outputs say what size is usual.
USUAL_ROWS = 8


def check_independent(task: Task, model: nn.Module, split: Split) -> None:
    """Compare rows drawn from the whole split, alone and in two different batches.

    Args:
        task: gives forward pass and loss.
        model: in eval mode.
        split: of at least two rows.

    Raises:
        TaskError: the model or the loss is random or keeps a state, or one of them mixes samples.
    """
    rows, device = telling_rows(split), device_of(model)

    def run(x: Tree) -> Tree:
        # A copy for each pass: the model may work in place on what it is given.
        return forward(task, model, tree_map(torch.clone, x))

    for number, batch in enumerate((rows[:FEW], [*rows[FEW:], *rows[1::-1]])):
        x, y = (to_device(tree, device) for tree in split.batch(batch))
        output = run(x)
        if number == 0:
            _check_repeatable(lambda x=x: run(x), output, tolerance_of(model), "model", passes=1)
        names = [f"{split.name}[{int(split.rows[row])}]" for row in batch]
        with naming_rows(split, batch):
            values = losses(task, output, y)
        try:
            for row, name in enumerate(names):
                check_row(task, run, tolerance_of(model), x, y, output, values, row, name)
        except TaskError:
            # What is seldom random is not to be blamed for mixing.
            _check_repeatable(lambda x=x: run(x), output, tolerance_of(model), "model", passes=8)
            _check_repeatable(lambda o=output, y=y: losses(task, o, y), values, LOSS_TOLERANCE, "loss", passes=8)
            raise


def check_row(
    task: Task,
    run: Callable[[Tree], Tree],
    tolerance: float,
    x: Tree,
    y: Tree,
    output: Tree,
    values: Tensor,
    row: int,
    name: str,
) -> None:
    """Compare one sample of a batch with itself alone.

    Args:
        task: gives the loss.
        run: the forward pass that gave the output, inputs (B, …) to outputs.
        tolerance: what outputs may differ by, as `tolerance_of`.
        x: inputs; y: labels; output: the model's, each (B, …).
        values: losses (B,).
        row: which of them.
        name: what it is called.

    Raises:
        TaskError: its output or its loss is another in the batch.
    """
    place, whole = slice(row, row + 1), leaves(output)
    alone = _output_alone(run, take(x, place), output, name)
    apart = {path: _apart(leaf[0], whole[path][row], whole[path], tolerance) for path, leaf in alone.items()}
    try:
        loss = losses(task, take(output, place), take(y, place))
    except TaskError as error:
        _refuse_output(apart, alone, output, row, name)
        what = f"it takes a batch of {len(values)}, but not a sample alone"
        raise _looks_across(output, y, what, f": {error.message}") from error
    loss_apart = _apart(loss, values[place], values, LOSS_TOLERANCE, LOSS_FLOOR)
    # All at once: a GPU is waited for each time it is asked.
    if torch.stack([part.any().to(values.device) for part in (*apart.values(), loss_apart)]).any():
        _refuse_output(apart, alone, output, row, name)
        what = f"of {name} it is {float(loss):.6g} alone, and {float(values[row]):.6g} in a batch of {len(values)}"
        raise _looks_across(output, y, what)


def telling_rows(split: Split) -> list[int]:
    """Six rows, or as many as there are, of some drawn with a seed: those which are filled with numbers other than zero least,
    most, and in between, so that padded ones differ in length; the first two the most."""
    most = DRAWN if isinstance(split.dataset, ArrayDataset) else DRAWN_BY_CODE
    drawn = torch.randperm(len(split), generator=generator("independence", len(split)))[:most].tolist()

    def filled(row: int) -> int:
        found = leaves(split.inputs([row])).values()
        return sum(int(torch.isfinite(leaf).logical_and(leaf != 0).sum()) for leaf in found)

    ordered = sorted(drawn, key=filled)
    places = [0, 1, 0.5, 0.25, 0.75, 0.9]
    return list(dict.fromkeys(ordered[round(place * (len(ordered) - 1))] for place in places))


def _check_repeatable(again: Callable[[], Tree], found: Tree, tolerance: float, what: str, passes: int) -> None:
    """Further passes over one batch must come to the same."""
    if not any(_differs(found, again(), tolerance) for _ in range(passes)):
        return
    seeded = []
    for _ in range(2):
        with global_seed("independence"):
            seeded.append(again())
    if what == "loss":
        raise TaskError("the loss is random: of one output it is another each time", "let it draw nothing")
    if not _differs(*seeded, tolerance):
        hint = "use F.dropout(…, training=self.training), and draw nothing in eval mode"
        raise TaskError("the model is random in eval mode: passes over one batch give other outputs", hint)
    raise TaskError(
        "the model keeps a state between passes in eval mode: passes over one batch give other outputs",
        "let forward() change nothing of the model, and draw nothing from generators of its own, in eval mode",
    )


def _differs(one: Tree, other: Tree, tolerance: float) -> bool:
    found, twins = leaves(one), leaves(other)
    return found.keys() != twins.keys() or any(
        leaf.shape != twins[path].shape or bool(_apart(leaf, twins[path], leaf, tolerance).any())
        for path, leaf in found.items()
    )


def _apart(one: Tensor, other: Tensor, batch: Tensor, tolerance: float, floor: float = 0.0) -> Tensor:
    """Where two tensors differ by more than rounding: by more than a share of their own size, and of the usual size of their
    place in a batch (B, …) and of all places. Huge numbers elsewhere (masked logits) allow nothing. Not a number, or infinite,
    on one side alone is a difference."""
    one, other, batch = (torch.view_as_real(part) if part.is_complex() else part for part in (one, other, batch[:USUAL_ROWS]))
    usual = batch.float().abs().nan_to_num(0, 0, 0).median(0).values
    around = usual.flatten().median() if usual.numel() else usual
    one, other = one.double(), other.double()
    allowed = tolerance * (torch.maximum(one.abs(), other.abs()) + usual + around) + floor
    both = torch.isfinite(one) & torch.isfinite(other)
    same = (one == other) | (torch.isnan(one) & torch.isnan(other))
    return ~same & (~both | ((one - other).abs() > allowed))


def _output_alone(run: Callable[[Tree], Tree], x: Tree, output: Tree, name: str) -> dict[str, Tensor]:
    """What the model gives for one sample alone, x (1, …), of the shapes that it has in a batch."""
    count, found = batch_size(output), leaves(output)
    try:
        alone = leaves(run(x))
    except TaskError as error:
        if error.__cause__ is None:
            # Nothing was raised: what it returned is the fault.
            raise
        raise TaskError(
            f"the model mixes samples in eval mode: it takes a batch of {count}, but not a sample alone: {error.message}", MIXES
        ) from error
    for path, leaf in alone.items():
        whole = found.get(path)
        if whole is None or whole.shape[1:] != leaf.shape[1:]:
            batched = "none" if whole is None else tuple(whole.shape[1:])
            raise TaskError(
                f"the model mixes samples in eval mode: {name} alone has an output of shape {tuple(leaf.shape[1:])}, "
                f"in a batch of {count} {batched}: it trims or pads to the longest of a batch",
                "pad to one length for all samples",
            )
    return alone


def _refuse_output(apart: dict[str, Tensor], alone: dict[str, Tensor], output: Tree, row: int, name: str) -> None:
    """Name the number that one sample alone has otherwise than in its row of a batch, if there is one."""
    found = leaves(output)
    for path, differs in apart.items():
        if differs.any():
            place = int(differs.flatten().int().argmax())
            single, batched = (value.flatten()[place].item() for value in (alone[path][0], found[path][row]))
            raise TaskError(
                f"the model mixes samples in eval mode: an output of {name} is {single:.6g} alone, "
                f"and {batched:.6g} in a batch of {batch_size(output)}",
                MIXES,
            )


def _looks_across(output: Tree, y: Tree, what: str, more: str = "") -> TaskError:
    """What is said of a loss that is another for the same output alone, with the cause where the shapes show it."""
    broadcast = _broadcast(output, y)
    cause, hint = (f"; {broadcast[0]}", broadcast[1]) if broadcast else ("", LOOKS_ACROSS)
    return TaskError(f"the loss looks across the batch: {what}{cause}{more}", hint)


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
