"""Standard output and error as a command wants them: there, in whatever encoding, and no reason to fail when nobody reads."""

import errno
import io
import os
import sys

from stages.foundation.errors import TryAgainError

# What is written to a pipe whose reader has had enough; on Windows it is the second.
READER_GONE = (errno.EPIPE, errno.EINVAL)


class _Descriptor(io.FileIO):
    """One of the two: what nobody is there to read is gone, without an error."""

    def __init__(self, stream: io.TextIOBase) -> None:
        super().__init__(stream.fileno(), "wb", closefd=False)
        self._holds_results, self._deaf = stream is sys.stdout, False
        # Given up, it would close the descriptor.
        self._replaced = stream

    def write(self, data: bytes) -> int:
        """Write, while there is a use.

        Raises:
            TryAgainError: results cannot be written for another reason than that.
        """
        try:
            return len(data) if self._deaf else super().write(data)
        except OSError as error:
            self._deaf = True
            if self._holds_results and error.errno not in READER_GONE:
                message = f"standard output cannot be written: {error.strerror}"
                raise TryAgainError(message, "make room, or send it elsewhere; then run the same command again") from error
            return len(data)


def settle_streams() -> None:
    """Put something in the place of streams that were closed, and let no character and no reader that went away be an error."""
    # In the order of their numbers, and before any file is opened, which would be given the number of one that is missing.
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115, PTH123 (as long as the process)
        elif mode == "w" and _is_plain(stream):
            stream.flush()
            buffer = io.BufferedWriter(_Descriptor(stream))
            lines = stream.line_buffering
            setattr(sys, name, io.TextIOWrapper(buffer, stream.encoding, "replace", line_buffering=lines))


def _is_plain(stream: io.TextIOBase) -> bool:
    """Whether it writes to a descriptor as it is, with or without a buffer; consoles of Windows do not."""
    buffer = getattr(stream, "buffer", None)
    return isinstance(getattr(buffer, "raw", buffer), io.FileIO)
