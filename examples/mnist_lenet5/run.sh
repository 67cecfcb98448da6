#!/usr/bin/env bash
# MNIST with LeNet5: makes .venv if needed, runs all stages, evaluates. Data from OCD_DATA/mnist, else downloaded.
#   bash examples/mnist_lenet5/run.sh              one seed, in examples/mnist_lenet5/run
#   bash examples/mnist_lenet5/run.sh --seeds 3    three seeds, and their mean ± standard deviation
# --seeds and --add go to `ocd evaluate`, other arguments also to `ocd run`. Safe to repeat: what is done is not done again.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh" examples
cd "$(dirname "${BASH_SOURCE[0]}")"
run_example "$@"
