"""The named failures of the library: each carries a message, a hint, and the exit code the command line gives it."""


class OcdError(Exception):
    """A failure a user can act on: `message` says what is wrong, `hint` what to do or type next."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ComputeError(OcdError):
    """Computing failed: a loss that is not finite, memory that ran out."""


class SettingsError(OcdError):
    """`ocd.toml`, a flag or an environment variable asks for something that does not exist or cannot be."""

    exit_code = 2


class TaskError(OcdError):
    """The user's own code does not import, lacks a name, raises, or returns what a task must not return."""

    exit_code = 2


class DataError(OcdError):
    """The user's data are missing, unreadable, empty, ragged, out of range or not finite."""

    exit_code = 2


class ArtifactError(OcdError):
    """An artifact of the run directory is missing, stale, corrupt, or belongs to something else."""

    exit_code = 3


class TryAgainError(OcdError):
    """Nothing is wrong with the request, but it cannot finish now: interrupted, disk full, stage in use."""

    exit_code = 4
