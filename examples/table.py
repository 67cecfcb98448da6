"""The table of an example over several seeds: `python table.py 3` in the example's folder, further arguments to `ocd run`.

Runs seeds 0, 1, … each in a run directory of its own, then prints mean ± standard deviation as Markdown.
"""

import json
import os
import platform
import statistics
import subprocess
import sys

import torch


def run_seed(seed: int, arguments: list[str]) -> dict[str, dict[str, float]]:
    """All stages with one seed: the metrics of each row."""
    command = [sys.executable, "-m", "ocd_cli", "run", "--json", "--seed", str(seed), "--run", f"run-seed-{seed}", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.returncode)
    return json.loads(done.stdout)["stages"]["infer"]["metrics"]


def main() -> None:
    """Print the table."""
    seeds, arguments = int(sys.argv[1]), sys.argv[2:]
    results = [run_seed(seed, arguments) for seed in range(seeds)]
    names = list(results[0]["base"])
    print(f"| row | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for row in results[0]:
        cells = []
        for name in names:
            values = [result[row][name] for result in results]
            spread = f" ± {statistics.stdev(values):.4f}" if seeds > 1 else ""
            cells.append(f"{statistics.mean(values):.4f}{spread}")
        print(f"| {row} | {' | '.join(cells)} |")
    machine = f"{os.cpu_count()} CPU cores, {platform.machine()}, torch {torch.__version__}"
    print(f"\nmean ± standard deviation over seeds 0 to {seeds - 1}, on the test set; {machine}")


if __name__ == "__main__":
    main()
