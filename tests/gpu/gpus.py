"""A machine with two pretended GPUs: commands that run there, and what a test asks of them."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from folders import Folder

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
DEVICES = 2
# The same on both sides: `auto` would take another denoiser, and another precision, on a GPU.
FAST: dict[str, dict[str, Any]] = {
    "task": {"validation_fraction": 0.2},
    "select-layer": {"draws": 20},
    "train-diffusion": {"preset": "mlp", "precision": "float32", "max_steps": 20, "evaluate_steps": 8, "checkpoint_steps": 6},
    "train-scale": {"max_steps": 20, "evaluate_steps": 8, "checkpoint_steps": 6},
    "evaluate": {"samples": 12, "resamples": 100, "strengths": [0.0, 1.0], "memorisation_samples": 8},
}
# What pretend_cuda notes that is no fault.
HARMLESS = ("process group", "fused optimizer: strides of axes of length one")


def find_pretence() -> Path:
    """Where pretend_cuda.py is looked for."""
    named = os.environ.get("OCD_PRETEND_CUDA")
    return Path(named) if named else ROOT.parent / "shared" / "pretend_cuda" / "pretend_cuda.py"


@dataclass
class Command:
    """A command under way on the pretended GPUs, in a process of its own."""

    gpus: "Gpus"
    words: list[str]
    pid: int
    out: Path
    code: int | None = None

    @property
    def stdout(self) -> str:
        return (self.out / "stdout").read_text()

    @property
    def stderr(self) -> str:
        return (self.out / "stderr").read_text()

    @property
    def shown(self) -> str:
        """What there is to see of it when a test fails."""
        return f"ocd {' '.join(self.words)}\nexit code {self.code}\n{self.stdout}\n{self.stderr}"

    def wait(self, code: int | None = 0) -> "Command":
        """Its end; the exit code is asserted (None: any), no traceback is shown, and the GPUs had nothing to complain of."""
        self.code = self.gpus.ask({"wait": self.pid})
        assert code is None or self.code == code, self.shown
        assert "Traceback" not in self.shown, self.shown
        assert "fault in ocd itself" not in self.shown, self.shown
        if (self.out / "seen.json").exists():
            assert not [note for note in self.seen["notes"] if not note.startswith(HARMLESS)], self.seen["notes"]
        return self

    @property
    def seen(self) -> dict[str, Any]:
        """What the pretended GPUs saw: allocations, peak bytes, waits of the host, notes, numbers of the GPUs in use."""
        return json.loads((self.out / "seen.json").read_text())


class Gpus:
    """Runs `ocd` where torch sees two GPUs: `gpus(folder, "collect", code=0)`."""

    def __init__(self) -> None:
        words = [sys.executable, str(find_pretence()), "--devices", str(DEVICES), str(HERE / "serve.py")]
        search = os.pathsep.join([str(ROOT), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"PYTHONPATH": search, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT
        )
        self._texts = tempfile.TemporaryDirectory()
        self.complaint = self._answer(expected="ready")

    def _answer(self, expected: str) -> str:
        """ "" when the first line is the expected one; else what it said on stderr."""
        if json.loads(self._process.stdout.readline() or '""') == expected:
            return ""
        return self._process.communicate()[1].strip()

    def ask(self, request: dict[str, Any]) -> Any:
        """One question, one answer."""
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def start(
        self,
        folder: Folder,
        *args: object,
        device: str = "cuda",
        oom_at: tuple[int, ...] = (),
        kill_at: int = 0,
        environment: dict[str, str] | None = None,
    ) -> Command:
        """Start a command; the allocations `oom_at` of it fail, and at `kill_at` it is killed (0: never)."""
        words = [*map(str, args), "--config", str(folder.config), "--device", device]
        out = Path(tempfile.mkdtemp(dir=self._texts.name))
        request = {"words": words, "out": str(out), "environment": environment or {}}
        pid = self.ask({**request, "oom_at": oom_at, "kill_at": kill_at})
        return Command(self, words, pid, out)

    def __call__(self, folder: Folder, *args: object, code: int | None = 0, **options: Any) -> Command:
        """Run a command."""
        return self.start(folder, *args, **options).wait(code)

    def close(self) -> None:
        """End it."""
        self._process.stdin.close()
        self._process.wait()
        self._texts.cleanup()
