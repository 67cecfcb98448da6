"""The benchmark for people with a GPU, gone through on a CPU."""

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parent / "benchmarks"
ROWS = {"collect_end_to_end", "collect_methods", "train_paper", "train_dense", "infer_paper"}


# 40 s: it makes and trains a small run of every kind.
def test_the_gpu_benchmark_goes_through_its_rows():
    command = [sys.executable, BENCHMARKS / "gpu.py", "--small", "--device", "cpu"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=BENCHMARKS.parent.parent)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["results"].keys() == ROWS
    assert found["machine"]["device"] == "cpu"
    methods = found["results"]["collect_methods"]["methods"]
    assert methods.keys() == {"outer product", "outer product, sgd, factored", "substitution", "vmap", "loop"}
    assert all(row["samples_per_second"] > 0 for row in methods.values())
    assert found["results"]["infer_paper"]["ms_per_input"] > 0


def test_kept_results_name_their_card_and_have_all_rows():
    for path in (BENCHMARKS / "results").glob("gpu-*.json"):
        found = json.loads(path.read_text())
        assert found["results"].keys() == ROWS
        assert path.stem == "gpu-" + found["machine"]["device"].lower().replace(" ", "-")
