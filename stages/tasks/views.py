"""What a sample shows of itself at a gradient step."""

from collections.abc import Sequence

from stages.seeds import generator
from stages.tasks.data import Split
from stages.tasks.protocol import Task
from stages.tasks.user_code import user_code
from stages.trees import Tree, batch_size, take


def has_views(task: Task) -> bool:
    """Whether the task shows another part of a sample at each gradient step."""
    return type(task).view is not Task.view


def views_of(task: Task, x: Tree, y: Tree, seeds: Sequence[tuple[str | int, ...]]) -> tuple[Tree, Tree]:
    """The part of each sample that is used at one gradient step: all of it, unless the task has a `view`.

    Args:
        task: cuts it out, on the CPU, where its generator lives.
        x: inputs (B, …).
        y: labels (B, …).
        seeds: of each sample's generator.

    Raises:
        TaskError: `view` raises, or gives no pairs.
        DataError: the samples' parts do not stack.
    """
    if not has_views(task):
        return x, y
    parts = []
    for i, seed in enumerate(seeds):
        with user_code("view()"):
            parts.append(task.view(take(x, i), take(y, i), generator(*seed)))
    return Split(parts, name="view()").batch(range(len(parts)))


def any_views(task: Task, x: Tree, y: Tree) -> tuple[Tree, Tree]:
    """The same with seeds of no account, to try things on."""
    return views_of(task, x, y, [("view", i) for i in range(batch_size(x))])
