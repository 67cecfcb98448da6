"""Reads its options while it is imported."""

import argparse

from mymodel import Net as Plain

parser = argparse.ArgumentParser()
parser.add_argument("--hidden", type=int, default=8)
options = parser.parse_args()


class Net(Plain):
    width = 3
