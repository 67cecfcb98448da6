"""Pictures of what infer answered, for people to look at: a strip an input, of base, overfitted, OCD and truth side by side."""

import io
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from stages.evaluation.from_run import make_subject
from stages.evaluation.subject import Batch, EvaluatedSamples
from stages.foundation.errors import TaskError
from stages.foundation.files import remove, write_bytes
from stages.foundation.progress import Report
from stages.foundation.trees import Tree, leaves, take, tree_map
from stages.lifecycle.context import RunContext
from stages.prediction.predicting import BASE, OUTPUT, stored_output
from stages.store.predictions import PredictionBlocks
from stages.tasks.data import Split
from stages.tasks.protocol import Task, uses_default
from stages.tasks.user_code import user_code

FOLDER = "pictures"
# In pixels: between two panes, the height of a caption, and the width that small pictures are enlarged to, or this height.
GAP, CAPTION, READABLE, TALLEST = 8, 20, 200, 2000
NO_PILLOW = 'no pictures: Pillow is missing; to have them: pip install "torch-ocd[examples]", then ocd infer --force'
HINT = "let it return a tensor (H, W, 3) or (H, W) of floats in [0, 1], or None for no picture"

# Of a sample, without its batch axis.
Pane = tuple[str, np.ndarray]


def check_pictures(task: Task, inputs: Split, like: Tree) -> None:
    """Draw the first input's output `like`, (1, …), and its label; a task that does not draw passes.

    Raises:
        TaskError: as `picture_of`.
    """
    if uses_default(task, "picture"):
        return
    x, y = take(inputs.inputs([0]), 0), inputs.labels([0])
    for output in (like, y) if y is not None else (like,):
        picture_of(task, x, take(output, 0))


def picture_of(task: Task, x: Tree, output: Tree) -> np.ndarray | None:
    """The task's picture of one sample's output (no batch axis), (H, W, 3) uint8; None where it has none.

    NaN is black where the output itself is not finite: no fault of the picture's.

    Raises:
        TaskError: picture() raises, or gives another shape, other numbers or NaN.
    """
    with user_code("picture()"), torch.no_grad():
        found = task.picture(x, output)
    if found is None:
        return None
    if not isinstance(found, Tensor):
        raise TaskError(f"picture() returned {type(found).__name__}, expected a tensor", HINT)
    shape, values = tuple(found.shape), found.detach().cpu()
    if not (len(shape) == 2 or (len(shape) == 3 and shape[2] == 3)) or not values.numel():
        raise TaskError(f"picture() returned shape {shape}, expected (H, W, 3) or (H, W)", HINT)
    if not (values.is_floating_point() or values.dtype == torch.bool):
        kind = str(values.dtype).removeprefix("torch.")
        raise TaskError(f"picture() returned {kind} of shape {shape}, expected floats in [0, 1]", HINT)
    if values.isnan().any() and _is_finite(output):
        count = int(values.isnan().sum())
        raise TaskError(f"picture() returned shape {shape} with {count:,} NaN, expected floats in [0, 1]", HINT)
    pixels = (values.float().nan_to_num(0.0).clamp(0, 1) * 255).round().to(torch.uint8)
    return (pixels if len(shape) == 3 else pixels.unsqueeze(2).expand(-1, -1, 3)).contiguous().numpy()


def _is_finite(tree: Tree) -> bool:
    return all(bool(torch.isfinite(leaf).all()) for leaf in leaves(tree).values())


def write_pictures(
    context: RunContext, inputs: Split, predictions: PredictionBlocks, like: Tree, most: int, report: Report, caption: str
) -> dict[str, int]:
    """Write strips of the first inputs (`most` at most) of an answer that is whole to `pictures` in its folder, named after the
    row in the user's data, one input in memory at a time; `like` is an output (1, …), `caption` stands below what is predicted.

    Returns:
        {"pictures": strips written}, or {} where the task does not draw.

    Raises:
        TaskError: as `picture_of`, and faults of the task in overfitting.
    """
    folder, total, written = predictions.folder / FOLDER, min(most, len(inputs)), 0
    # What a killed process drew.
    remove(folder)
    if uses_default(context.task, "picture"):
        return {}
    if total and find_spec("PIL") is None:
        report.message(NO_PILLOW)
        total = 0
    for position, panes in enumerate(_panes(context, inputs, predictions, like, total, caption)):
        if panes:
            folder.mkdir(exist_ok=True)
            write_bytes(folder / f"{int(inputs.rows[position]):06d}.png", strip(panes))
            written += 1
        report.progress(position + 1, total, "pictures")
    return {"pictures": written}


def _panes(
    context: RunContext, inputs: Split, predictions: PredictionBlocks, like: Tree, total: int, caption: str
) -> Iterator[list[Pane]]:
    """Captions and pictures of one input after another."""
    labelled = total > 0 and inputs.labels([0]) is not None
    overfitted = _overfitted(context, inputs) if labelled else None
    for position, (base, ours) in enumerate(_answered(predictions, like, total)):
        outputs = {"base": base, caption: ours}
        if overfitted:
            x, y, best = overfitted(position)
            outputs = {"base": base, "overfitted": best, caption: ours, "truth": y}
        else:
            x = take(inputs.inputs([position]), 0)
        found = {name: (picture_of(context.task, x, output), output) for name, output in outputs.items()}
        yield [
            (name if _is_finite(output) else f"{name} (not finite)", picture)
            for name, (picture, output) in found.items()
            if picture is not None
        ]


def _answered(predictions: PredictionBlocks, like: Tree, total: int) -> Iterator[tuple[Tree, Tree]]:
    """What the base and the ensemble gave for each of the first inputs."""
    for block in range(predictions.blocks):
        span = predictions.block_range(block)
        if span.start >= total:
            return
        base, ours = (stored_output(predictions.read(block), name, like) for name in (BASE, OUTPUT))
        for place in range(min(len(span), total - span.start)):
            yield take(base, place), take(ours, place)


def _overfitted(context: RunContext, inputs: Split) -> Callable[[int], tuple[Tree, Tree, Tree]]:
    """From an input's position to its x, y and the base's output with the delta of its own label, as `evaluate` has it: one
    sample at a time, for it may be huge."""
    subject = make_subject(context, context.layer)
    evaluated = EvaluatedSamples(inputs, torch.arange(len(inputs)))

    def output(position: int) -> tuple[Tree, Tree, Tree]:
        batch = Batch(subject, evaluated, torch.tensor([position]))
        members = batch.along(batch.overfitted.unsqueeze(1))(1.0)
        x, y = batch.given
        return take(x, 0), take(y, 0), tree_map(lambda leaf: leaf[0, 0].cpu(), members)

    return output


def strip(panes: list[Pane]) -> bytes:
    """Pictures (H, W, 3) uint8 side by side with their captions above, as a PNG; small ones are enlarged."""
    # Whoever never draws need not have it.
    from PIL import Image, ImageDraw

    pictures = [enlarged(picture) for _, picture in panes]
    widths = [max(READABLE, picture.shape[1]) for picture in pictures]
    size = (sum(widths) + GAP * (len(panes) - 1), CAPTION + max(len(picture) for picture in pictures))
    canvas, left = Image.new("RGB", size, "white"), 0
    pen = ImageDraw.Draw(canvas)
    for (caption, _), picture, width in zip(panes, pictures, widths, strict=True):
        pen.text((left, 4), caption, fill="black")
        canvas.paste(Image.fromarray(picture), (left, CAPTION))
        left += width + GAP
    stream = io.BytesIO()
    canvas.save(stream, "PNG")
    return stream.getvalue()


def enlarged(picture: np.ndarray) -> np.ndarray:
    """A picture (H, W, 3), each of its pixels repeated so often that it is wide enough to be seen, and not too tall."""
    height, width = picture.shape[:2]
    times = max(1, min(-(-READABLE // width), TALLEST // height))
    return picture.repeat(times, axis=0).repeat(times, axis=1)
