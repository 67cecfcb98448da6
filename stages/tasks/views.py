"""The part of a sample that is used at one gradient step."""

from collections.abc import Callable, Sequence

import torch

from stages.foundation.seeds import generator
from stages.foundation.trees import Tree, batch_size, take
from stages.tasks.data import Split
from stages.tasks.protocol import Task, uses_default
from stages.tasks.user_code import user_code


def has_views(task: Task) -> bool:
    """Whether the task shows another part of a sample at each gradient step."""
    return not uses_default(task, "view")


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
    return _parts("view()", task.view, x, y, seeds) if has_views(task) else (x, y)


def glances_of(task: Task, x: Tree, y: Tree, seeds: Sequence[tuple[str | int, ...]]) -> tuple[Tree, Tree]:
    """As `views_of`, of what is used at one step of training the denoiser by the task's loss."""
    whole = uses_default(task, "view") and uses_default(task, "glance")
    return (x, y) if whole else _parts("glance()", task.glance, x, y, seeds)


def _parts(
    name: str,
    cut: Callable[[Tree, Tree, torch.Generator], tuple[Tree, Tree]],
    x: Tree,
    y: Tree,
    seeds: Sequence[tuple[str | int, ...]],
) -> tuple[Tree, Tree]:
    parts = []
    for i, seed in enumerate(seeds):
        with user_code(name):
            parts.append(cut(take(x, i), take(y, i), generator(*seed)))
    return Split(parts, name=name).batch(range(len(parts)))


def any_views(task: Task, x: Tree, y: Tree) -> tuple[Tree, Tree]:
    """The same with seeds of no account, to try things on."""
    return views_of(task, x, y, [("view", i) for i in range(batch_size(x))])
