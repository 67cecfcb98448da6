"""What a finished run costs: the paper's Table 8 for it."""

import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

import torch

from stages.foundation.trees import batch_size, to_device
from stages.lifecycle.context import RunContext
from stages.prediction.predictor import load_generator, load_personalised
from stages.run_directory.pipeline import LEARNED

TIMED_SAMPLES = 64


def cost(context: RunContext, members: int, samples: int) -> dict[str, Any]:
    """Parameters, milliseconds a sample (measured with at most 64) of the base, one draw and an ensemble, and the seconds each
    stage took."""
    personalised = load_personalised(context, strength=1.0)[0]
    x = context.test_split.inputs(range(min(TIMED_SAMPLES, samples, len(context.test_split))))
    on_device, count = to_device(x, context.device), batch_size(x)

    def base() -> None:
        with torch.no_grad():
            context.forward(context.base, on_device)

    def milliseconds(call: Callable[[], Any]) -> float:
        """A sample's part of the faster of two runs."""
        times = []
        for _ in range(2):
            start = time.perf_counter()
            call()
            context.wait()
            times.append(time.perf_counter() - start)
        return 1e3 * min(times) / count

    generate = load_generator(context, strength=1.0)
    networks = {"base": context.base, "denoiser": generate.denoiser, "scale": generate.scale}
    return {
        "parameters": {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()},
        "base_ms": milliseconds(base),
        "ocd_one_draw_ms": milliseconds(lambda: personalised.predict(x, 1)),
        "ocd_ensemble_ms": milliseconds(lambda: personalised.predict(x, members)),
        "stage_seconds": stage_seconds(context),
    }


def stage_seconds(context: RunContext) -> dict[str, float]:
    """How long each stage of a run took that predictions need: of the process that finished it."""
    made, moment = {name: context.manifest_of(name).made for name in LEARNED}, datetime.fromisoformat
    return {name: (moment(its.ended) - moment(its.started)).total_seconds() for name, its in made.items()}
