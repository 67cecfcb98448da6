"""Compare what two versions of ocd made of the same projects: `python tests/compare_runs.py OLD NEW`, folders of finished runs.

Predictions, results, weights and delta stores must be equal to the byte, apart from seconds and milliseconds in the results.
Prints one JSON object, and ends with 1 if anything differs or is missing. Give both versions the same batch sizes and threads:

    ocd run --set run.threads=1 --set collect.batch_size=64 --set collect.block_samples=256 --set infer.batch_size=64
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def untimed(value: Any) -> Any:
    """A result without what is measured with a clock."""
    if isinstance(value, dict):
        return {key: untimed(entry) for key, entry in value.items() if "seconds" not in key and not key.endswith("_ms")}
    return [untimed(entry) for entry in value] if isinstance(value, list) else value


def equal(old: Path, new: Path) -> bool:
    """Whether two files say the same."""
    if old.suffix == ".npz":
        with np.load(old) as before, np.load(new) as after:
            return before.files == after.files and all(
                (before[name].dtype, before[name].shape, before[name].tobytes())
                == (after[name].dtype, after[name].shape, after[name].tobytes())
                for name in before.files
            )
    if old.name == "results.json":
        return untimed(json.loads(old.read_text())) == untimed(json.loads(new.read_text()))
    return old.read_bytes() == new.read_bytes()


def compared(folder: Path) -> list[Path]:
    """The files that must be equal: answers, evaluations, weights and chunks of every run below a folder."""
    patterns = ("predictions.npz", "results.json", "*.safetensors", "c.*")
    found = {path for pattern in patterns for path in folder.rglob(pattern) if "checkpoints" not in path.parts}
    return sorted(path.relative_to(folder) for path in found)


def main(old: Path, new: Path) -> int:
    """Print what was compared and what differs."""
    names = compared(old)
    missing = [str(name) for name in names if not (new / name).is_file()]
    different = [str(name) for name in names if (new / name).is_file() and not equal(old / name, new / name)]
    more = [str(name) for name in compared(new) if not (old / name).is_file()]
    print(json.dumps({"files": len(names), "different": different, "missing": missing, "only in new": more}, indent=1))
    return 1 if different or missing or more or not names else 0


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:3])))
