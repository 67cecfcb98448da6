#!/usr/bin/env bash
# From two npz files to predictions: makes .venv if needed, then runs all stages. Arguments go to `ocd run`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh" examples
cd "$(dirname "${BASH_SOURCE[0]}")"
ocd run "$@"
