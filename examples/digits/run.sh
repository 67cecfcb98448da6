#!/usr/bin/env bash
# The digits example: makes .venv if needed, runs all stages, evaluates, prints the table.
#   bash examples/digits/run.sh              one seed, in examples/digits/run
#   bash examples/digits/run.sh --seeds 3    three seeds, and their mean ± standard deviation
# --seeds and --add go to `ocd evaluate`, other arguments also to `ocd run`. Safe to repeat: what is done is not done again.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh" examples
cd "$(dirname "${BASH_SOURCE[0]}")"
run_example "$@"
