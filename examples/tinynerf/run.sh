#!/usr/bin/env bash
# The TinyNeRF example: makes .venv if needed, trains the base, runs all stages on the Lego scene, evaluates, prints the table.
#   bash examples/tinynerf/run.sh
#   bash examples/tinynerf/run.sh --set 'task.args.scene="path/to/nerf_synthetic/hotdog"' --run run-hotdog
# --seeds and --add go to `ocd evaluate`, other arguments also to `ocd run`. Safe to repeat: what is done is not done again.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh" examples
cd "$(dirname "${BASH_SOURCE[0]}")"
run_example "$@"
