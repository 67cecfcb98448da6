"""The scene loader of the TinyNeRF example, and what tests ask of it."""

import sys

import pytest
from folders import EXAMPLES
from refusals import refusal

from stages.foundation.errors import DataError

# The example's modules import one another, as they do where a user runs it.
with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, "path", [*sys.path, str(EXAMPLES / "tinynerf")])
    import scenes
    from posed_pictures import ARRAYS, FORM, LAYOUTS, POSE
    from scenes import load_scene, pixel_rays

__all__ = ["ARRAYS", "FORM", "LAYOUTS", "POSE", "counts", "load_scene", "pixel_rays", "scene_refusal", "scenes"]


def scene_refusal(*args, kind=DataError, **named):
    """The message and hint with which a scene is refused."""
    return refusal(kind, load_scene, *args, **named)


def counts(scene):
    return len(scene.train), len(scene.validation or ()), len(scene.test)
