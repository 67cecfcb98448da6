"""How train.npz and test.npz were made: scikit-learn's bundled breast cancer data, split and standardised."""

from pathlib import Path

import numpy as np
from sklearn.datasets import load_breast_cancer

TEST_SAMPLES = 169


def main() -> None:
    """Write both files beside this one."""
    data = load_breast_cancer()
    order = np.random.default_rng(0).permutation(len(data.target))
    train, test = order[TEST_SAMPLES:], order[:TEST_SAMPLES]
    mean, deviation = data.data[train].mean(0), data.data[train].std(0)
    for name, rows in (("train", train), ("test", test)):
        x = ((data.data[rows] - mean) / deviation).astype(np.float32)
        np.savez_compressed(Path(__file__).with_name(f"{name}.npz"), x=x, y=data.target[rows])


if __name__ == "__main__":
    main()
