"""What the library says when it refuses."""

import pytest


def refusal(kind, call, *args, **named):
    """The message and the hint with which a call is refused, by an error of this kind."""
    with pytest.raises(kind) as caught:
        call(*args, **named)
    return caught.value.message, caught.value.hint
