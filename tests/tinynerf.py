"""The TinyNeRF example's modules, and copies of it with settings for small scenes."""

import importlib.util
import sys

import pytest
from folders import EXAMPLES, own_task
from folders import example as copy_of_example
from spheres import sphere_scene

SIZE, TRAIN, VALIDATION, TEST, REPEATS, STEPS, LR, RAYS = 12, 8, 5, 4, 2, 3, 0.005, 64
LAYER, SAMPLES, NEAR, FAR = "layer1.weight", 32, 2.0, 6.0


def load(name):
    """A module of the example, under a name that no other test's `task` has."""
    path = EXAMPLES / "tinynerf" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"tinynerf_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# They import one another, as they do where a user runs the example.
with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, "path", [*sys.path, str(EXAMPLES / "tinynerf")])
    nerf, task = load("nerf"), load("task")


def make_example(folder, scene):
    """A copy of the example with settings for a small scene, `scene` being a path from its folder."""
    example = copy_of_example("tinynerf", folder)
    args = {"glanced_rays": 32, "base_steps": 60, "base_rays": 128, "longer_steps": 30}
    denoiser = {"preset": "mlp", "batch_size": 8, "max_steps": 20, "evaluate_steps": 10}
    tuned = {"tune_after": 10, "conditioning_noise": 0.1, "encoders": {"base_output": "task:PooledPicture"}}
    example.write(
        {
            "task": own_task("task:NerfTask", scene=scene, rays=RAYS, **args),
            "select-layer": {"layer": LAYER, "draws": 0},
            "collect": {"lr": LR, "steps": STEPS, "repeats": REPEATS, "block_samples": 4, "batch_size": 2},
            "train-diffusion": denoiser | tuned,
            "train-scale": {"batch_size": 8, "max_steps": 20, "evaluate_steps": 10},
            "evaluate": {"resamples": 100, "strengths": [0.0, 0.5, 1.0]},
        }
    )
    return example


def make_scene(folder, **options):
    return sphere_scene(folder, **{"train": TRAIN, "validation": VALIDATION, "test": TEST, "size": SIZE} | options)
