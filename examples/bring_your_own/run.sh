#!/usr/bin/env bash
# From two npz files to predictions and a verdict: makes .venv if needed, runs all stages, evaluates.
#   bash examples/bring_your_own/run.sh              one seed, in examples/bring_your_own/run
#   bash examples/bring_your_own/run.sh --seeds 3    three seeds, and their mean ± standard deviation
# --seeds and --add go to `ocd evaluate`, other arguments also to `ocd run`. Safe to repeat: what is done is not done again.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh" examples
cd "$(dirname "${BASH_SOURCE[0]}")"
run_example "$@"
