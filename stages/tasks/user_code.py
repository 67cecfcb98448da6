"""Running the user's code so that what it raises becomes one message with the user's own frames."""

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch

from stages.foundation.errors import ComputeError, OcdError, TaskError
from stages.foundation.torch_state import their_torch

_OURS = Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def user_code(what: str) -> Iterator[None]:
    """Run a piece of the user's code under torch's defaults as it expects them; `what` says which in the message.

    Raises:
        TaskError, ComputeError: as `user_faults`.
    """
    with user_faults(what), their_torch():
        yield


@contextlib.contextmanager
def user_faults(what: str) -> Iterator[None]:
    """Take what is raised for a fault of the user's code: in a backward pass it is called by torch.

    Raises:
        TaskError: something was raised; the message ends with the frames of the user's own files.
        ComputeError: memory ran out.
    """
    try:
        yield
    except (OcdError, KeyboardInterrupt):
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ComputeError(f"{what}: out of memory: {error}", "use smaller batches, or free memory") from error
    except (Exception, SystemExit) as error:
        raise TaskError(
            f"{what} raised {type(error).__name__}: {error}{_frames(error)}", "mend it, then run the same command again"
        ) from error


def _frames(error: BaseException) -> str:
    """The user's frames of a traceback, innermost last; libraries' and our own are left out."""
    lines = []
    for frame in traceback.extract_tb(error.__traceback__):
        path = Path(frame.filename)
        library = (
            "site-packages" in path.parts
            or frame.filename.startswith("<")
            or ("lib" in path.parts and "python3" in frame.filename)
        )
        if not library and not path.resolve().is_relative_to(_OURS):
            lines.append(f"\n  {path.name}, line {frame.lineno}, in {frame.name}: {frame.line or ''}".rstrip())
    return "".join(lines[-4:])
