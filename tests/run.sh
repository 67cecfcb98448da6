#!/usr/bin/env bash
# Sets up .venv and runs the checks: ruff, then the tests, in two processes. Arguments go to pytest; --slow adds what takes minutes,
# --gpu runs what needs a pretended GPU instead.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../examples/setup.sh" test,examples
cd "$root"
marked="not slow and not pretended_gpu"
arguments=()
for argument in "$@"; do
    case "$argument" in
    --slow) marked="not pretended_gpu" ;;
    --gpu) marked="pretended_gpu" ;;
    *) arguments+=("$argument") ;;
    esac
done
ruff check --quiet .
ruff format --quiet --check .
# By file, since tests of a file share what they are made on.
python -m pytest --numprocesses 2 --dist loadfile -m "$marked" ${arguments[@]+"${arguments[@]}"}
