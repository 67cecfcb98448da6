"""Settings of tasks where it is known beforehand what OCD can do, which are in tests/projects/planted."""

from folders import own_task

FAST = {
    "train-diffusion": {"width": 64, "blocks": 1, "batch_size": 64, "max_steps": 400, "evaluate_steps": 100, "lr": 1e-3},
    "train-scale": {"width": 32, "batch_size": 64, "max_steps": 200},
    "infer": {"ensemble": 5, "sample_steps": 10},
    "evaluate": {"resamples": 500, "memorisation_samples": 50},
}
# OCD must help: an under-fitted base whose residual is a known function of the layer's input.
HELPING = FAST | {
    "task": own_task("mytask:Planted"),
    "train-base": {"epochs": 1, "lr": 1e-3, "batch_size": 100},
    "select-layer": {"layer": "0.weight", "draws": 0},
    "collect": {"optimizer": "sgd", "lr": 0.3, "steps": 3},
}
# OCD cannot help: labels independent of x, and an over-confident base.
HOPELESS = FAST | {
    "task": own_task("mytask:Hopeless"),
    "train-base": {"epochs": 60, "lr": 3e-3, "batch_size": 32, "patience": 0},
    "select-layer": {"layer": "2.weight", "draws": 0},
    "collect": {"optimizer": "adam", "lr": 5e-3, "steps": 3},
}
