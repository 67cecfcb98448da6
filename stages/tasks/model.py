"""The base network as the task makes it: a plain module whose parameters are there."""

from collections.abc import Callable

import torch
from torch import nn

from stages.foundation.errors import TaskError
from stages.foundation.trees import Tree
from stages.tasks.loader import forward
from stages.tasks.protocol import Task
from stages.tasks.user_code import user_code


def make_model(task: Task, sample: Callable[[], Tree]) -> nn.Module:
    """The task's model. What torch.compile has made of it is undone, gradients of embeddings are dense, and lazy modules have
    seen a sample.

    Args:
        task: makes it.
        sample: gives inputs (B, …) for the forward pass that lazy modules need.

    Raises:
        TaskError: it is no module, or a scripted one.
    """
    with user_code("model()"):
        model = task.model()
    if not isinstance(model, nn.Module):
        raise TaskError(
            f"model() returned {type(model).__name__}, expected a torch.nn.Module",
            "task.model names a class or a function that makes one",
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise TaskError(
            f"model() returned a {type(model).__name__}: the forward pass of a scripted or traced model cannot be changed",
            "return the nn.Module itself, without torch.jit.script and torch.jit.trace; its state dict has the same keys",
        )
    model = _uncompiled(model)
    for module in model.modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            # Sparse gradients are the same numbers, in a form that few optimizers take.
            module.sparse = False
    if any(nn.parameter.is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        with torch.no_grad():
            put_in_eval_mode(model)
            forward(task, model, sample())
    return model


def _uncompiled(model: nn.Module) -> nn.Module:
    """The module that torch.compile wraps, here and in its submodules: compiled code does not see a weight that is replaced."""
    model = getattr(model, "_orig_mod", model)
    for module in model.modules():
        # Module.compile() leaves what it made here.
        if getattr(module, "_compiled_call_impl", None) is not None:
            module._compiled_call_impl = None
        for name, child in module.named_children():
            if hasattr(child, "_orig_mod"):
                setattr(module, name, child._orig_mod)
    return model


def put_in_eval_mode(model: nn.Module) -> None:
    """Eval mode, by the model's own `eval()`, whatever that returns."""
    with user_code("eval()"):
        model.eval()


def settle_embeddings(model: nn.Module) -> None:
    """Bring the rows of embeddings with a largest norm to it, as a forward pass does to the rows that it reads: every pass
    finds the same weights then."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
                rows = torch.arange(module.num_embeddings, device=module.weight.device)
                torch.embedding_renorm_(module.weight, rows, module.max_norm, module.norm_type)
