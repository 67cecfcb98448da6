#!/usr/bin/env bash
# Sets up .venv and runs the checks: ruff, then the tests, in two processes. Arguments go to pytest; --slow adds what takes minutes.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../examples/setup.sh" test,examples
cd "$root"
arguments=(-m "not slow")
for argument in "$@"; do
    if [ "$argument" = "--slow" ]; then arguments=(); break; fi
done
for argument in "$@"; do
    if [ "$argument" != "--slow" ]; then arguments+=("$argument"); fi
done
ruff check --quiet .
ruff format --quiet --check .
# By file, since tests of a file share what they are made on.
python -m pytest --numprocesses 2 --dist loadfile "${arguments[@]}"
