"""When the memory of a GPU runs out."""

import gc

import torch


def ran_out(error: BaseException) -> bool:
    """Whether an error says that a GPU's memory ran out, itself or by its cause."""
    return isinstance(error, torch.OutOfMemoryError) or isinstance(error.__cause__, torch.OutOfMemoryError)


def give_back() -> None:
    """Give back what nobody uses any more, so that less can be asked for; the error and its frames must be gone."""
    gc.collect()
    torch.cuda.empty_cache()
