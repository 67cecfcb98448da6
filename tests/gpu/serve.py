"""Runs commands of `ocd` on a pretended GPU, each in a process forked from this one, which has imported everything already.

Started by pretend_cuda.py; requests come on stdin and answers go to stdout, one JSON object a line (see `Gpus` in gpus.py). It
never computes itself: threads that a device's work needs do not survive a fork.
"""

import importlib
import json
import os
import pkgutil
import signal
import sys
from pathlib import Path
from typing import Any

import pretend_cuda

import stages
from ocd_cli.app import main


def import_all() -> None:
    """What commands import when they are called."""
    for found in pkgutil.walk_packages(stages.__path__, "stages."):
        importlib.import_module(found.name)
    # Imported when a store, a table or a data set is first asked for.
    for name in ("zarr", "sklearn.datasets", "torch.distributed", "torch.utils.flop_counter", "rich.table"):
        importlib.import_module(name)


def become(request: dict[str, Any]) -> None:
    """Run one command, and leave what the pretended GPU saw of it."""
    gpu, out, code, devices = pretend_cuda.GPU, Path(request["out"]), 70, note_devices()
    try:
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(out / name, os.O_WRONLY | os.O_CREAT), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w") for number in (1, 2))
        os.environ.update(request["environment"])
        gpu.oom_at = set(request["oom_at"])
        gpu.large = 0
        if request["kill_at"]:
            kill_at(request["kill_at"])
        sys.argv = ["ocd", *request["words"]]
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        gpu.flush()
        seen = {"allocations": gpu.large, "peak_bytes": gpu.peak, "waits": sum(gpu.waits.values())}
        (out / "seen.json").write_text(json.dumps({**seen, "notes": list(gpu.notes), "devices": sorted(devices)}))
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def note_devices() -> set[int]:
    """The numbers of the GPUs that tensors are made on, from now on."""
    seen, new = set(), pretend_cuda.CudaTensor.__new__

    def noted(kind: type, elem: Any, index: int) -> Any:
        seen.add(index)
        return new(kind, elem, index)

    pretend_cuda.CudaTensor.__new__ = staticmethod(noted)
    return seen


def kill_at(number: int) -> None:
    """Let this process die by SIGKILL at an allocation."""
    hold = pretend_cuda.GPU.hold

    def deadly(elem: Any) -> Any:
        if pretend_cuda.GPU.large >= number:
            os.kill(os.getpid(), signal.SIGKILL)
        return hold(elem)

    pretend_cuda.GPU.hold = deadly


def serve() -> None:
    """Until stdin ends."""
    for line in sys.stdin:
        request = json.loads(line)
        if "words" in request:
            answer = os.fork()
            if answer == 0:
                become(request)
        else:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    import_all()
    print(json.dumps("ready"), flush=True)
    serve()
