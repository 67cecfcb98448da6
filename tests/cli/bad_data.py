"""Bad input in arrays and files of data, and in what `infer` is asked."""

import pickle
import zipfile

import numpy as np
from bad_input import Bad
from folders import arrays

X, Y = arrays(40, 0)


def with_entry(values, place, value):
    """Another number at one place."""
    changed = values.copy()
    changed[place] = value
    return changed


def ragged():
    x = np.empty(4, dtype=object)
    x[:] = [[1.0], [1.0, 2.0], [1.0], [1.0]]
    return x


# x and y, and what the message says; of whichever of the three sets they are.
ARRAYS = {
    "no rows": (X[:0], Y[:0], [" is empty: x has shape (0, 4)"]),
    "ragged": (ragged(), Y[:4], ["x is ragged or holds Python objects, which would need pickle", "rectangular"]),
    "pickled labels": (X[:4], np.array([{}] * 4), ["y is ragged or holds Python objects, which would need pickle"]),
    "not a number": (with_entry(X, (7, 1), np.nan), Y, ["x[7] is not finite"]),
    "infinite": (with_entry(X, (39, 1), np.inf), Y, ["x[39] is not finite"]),
    "no numbers for labels": (X[:3], np.array(["a", "b", "c"]), ["y has dtype <U1, expected numbers"]),
    "complex": (X[:3].astype(complex), Y[:3], ["x has dtype complex128, expected numbers"]),
    "a single number": (np.float32(3), Y[:1], ["x is a single number, expected one row per sample"]),
    "unlike lengths": (X, Y[:39], ["x has 40 rows, y has 39"]),
    "no labels": (X, None, ["no array y; it has x", "numpy.savez"]),
    "bytes": (np.zeros((9, 4), np.uint8), Y[:9], ["x is uint8, which models do not take", "x.astype('float32') / 255"]),
    "label too large": (X, with_entry(Y, 5, 3), ["y[5]", "label 3 is out of range", "3 outputs", "0 … 2"]),
    "label below zero": (X, with_entry(Y, 38, -1), ["y[38]", "label -1 is out of range"]),
}
# These are a matter of the whole task, found with train.
OF_THE_TASK = {
    "labels with fractions": (X[:9], np.full(9, 0.5), ["cross_entropy needs integer labels", "float"]),
    "labels of another shape": (X[:9], np.zeros((9, 2), int), ["(4, 2)", "does not fit", "(4, 3)"]),
}


def saved(role, x, y):
    def change(folder, _):
        folder.save("validation.npz", *arrays(12, 3))
        folder.save(f"{role}.npz", x, y)

    return change


def arrays_of(role):
    settings = {"task": {"validation": "validation.npz"}} if role == "validation" else {}
    for name, (x, y, says) in ARRAYS.items():
        yield Bad(f"{role}: {name}", "train-base", [role, *says], settings=settings, change=saved(role, x, y))


def binary(role):
    """Here a label is a row of numbers, any of which may be the wrong one."""

    def change(folder, _):
        for name, rows in (("train", 40), ("test", 24)):
            y = np.zeros((rows, 3))
            y[9, 1] = 2 if name == role else 1
            folder.save(f"{name}.npz", arrays(rows, 0)[0], y)

    settings = {"task": {"loss": "binary_cross_entropy"}}
    says = [role, "y[9]", "label 2 is out of range", "[0, 1]"]
    return Bad(f"{role}: binary label", "train-base", says, settings=settings, change=change, begins=True)


# Files


def single_array(path):
    with path.open("wb") as stream:
        np.save(stream, np.zeros(3))


FILES = {
    "missing": (lambda path: path.unlink(), "is missing\n  ocd.toml names it under [task]; relative paths start at its folder"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "train.npz"),
    "a text": (lambda path: path.write_text("x,y\n1,2\n"), "is not an npz file"),
    "nothing": (lambda path: path.write_bytes(b""), "is not an npz file"),
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:200]), "is not an npz file"),
    "an empty archive": (lambda path: zipfile.ZipFile(path, "w").close(), "no array x"),
    "a single array": (single_array, "is not an npz file: it is a single array"),
    "a broken archive": (lambda path: path.write_bytes(b"PK\x03\x04 and then nothing of the kind"), "is not an npz file"),
    "a pickle": (lambda path: path.write_bytes(pickle.dumps({"x": 1})), "is not an npz file"),
}


def of_train(change):
    return lambda folder, _: change(folder.root / "train.npz")


# Inputs

GOOD = np.random.default_rng(4).normal(size=(5, 4)).astype(np.float32)
INPUTS = {
    "missing": (None, ["new.npz is missing"]),
    "another shape": ({"x": GOOD[:, :3]}, ["new.npz", "float32 (3,)", "expected float32 (4,)"]),
    "another rank": ({"x": GOOD[:, :, None]}, ["new.npz", "(4, 1)", "(4,)"]),
    "another dtype": ({"x": GOOD.astype(np.int32)}, ["new.npz", "int64", "expected float32 (4,)"]),
    "bytes": ({"x": np.zeros((5, 4), np.uint8)}, ["new.npz", "uint8", "/ 255"]),
    "not a number": ({"x": with_entry(GOOD, (2, 1), np.nan)}, ["new.npz", "x[2] is not finite"]),
    "no rows": ({"x": GOOD[:0]}, ["new.npz", "empty"]),
    "no x": ({"inputs": GOOD}, ["new.npz", "no array x", "inputs"]),
    "a label out of range": ({"x": GOOD, "y": np.array([0, 1, 2, 7, 0])}, ["new.npz: y[3]: label 7 is out of range"]),
}


def asked(given):
    return lambda folder, _: given is None or np.savez(folder.root / "new.npz", **given)


def good_input(folder, _):
    np.savez(folder.root / "new.npz", x=GOOD.astype(np.float64))


def nan_in_regression(folder, _):
    folder.save("train.npz", X, with_entry(np.ones((40, 3)), (11, 2), np.nan))


ROWS = [
    *(row for role in ("train", "test", "validation") for row in arrays_of(role)),
    *(Bad(f"train: {name}", "train-base", says, change=saved("train", x, y)) for name, (x, y, says) in OF_THE_TASK.items()),
    binary("train"),
    binary("test"),
    Bad(
        "a regression's label that is not finite",
        "train-base",
        ["train.npz", "y[11] is not finite"],
        settings={"task": {"loss": "mse"}},
        change=nan_in_regression,
    ),
    Bad(
        "data that are mended",
        "train-base",
        ["x[3]"],
        change=saved("train", with_entry(X, (3, 1), np.nan), Y),
        mend=saved("train", X, Y),
        then=["train-base"],
    ),
    *(
        Bad(f"train.npz: {name}", "train-base", ["train.npz", says], hides=["allow_pickle=True"], change=of_train(change))
        for name, (change, says) in FILES.items()
    ),
    *(
        Bad(
            f"infer: {name}",
            "infer --input {root}/new.npz",
            says,
            finished=True,
            change=asked(given),
            mend=good_input,
            then=["infer --input {root}/new.npz"],
        )
        for name, (given, says) in INPUTS.items()
    ),
    Bad(
        "data changed between stages",
        "collect --force",
        ["train-base is stale", "content of train was", "is now", "ocd train-base --force"],
        3,
        finished=True,
        change=lambda folder, _: folder.save("train.npz", *arrays(40, 5)),
    ),
]
