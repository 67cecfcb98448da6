"""Damage to a delta store, of every kind."""

import json
import os
import re

from folders import blocks_of, flip


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


HARM = {"flipped byte": flip, "cut short": cut, "deleted": os.unlink}


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def kept_time(change):
    def changed(path):
        info = path.stat()
        change(path)
        os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))

    return changed


def other_sum(path):
    """One digit of a mean loss, such as one flipped bit makes."""
    text = path.read_text()
    changed = re.sub(r'("base_loss": \d+\.)(\d)', lambda found: found[1] + str(int(found[2]) ^ 1), text)
    assert changed != text
    path.write_text(changed)


def edited(pattern, text):
    """Another text in the place of one."""
    return lambda path: path.write_text(re.sub(pattern, text, path.read_text()))


def no_chunks(path):
    for chunk in json.loads(path.read_text())["chunks"]:
        (path.parent.parent / chunk).unlink()


def other_record(path):
    path.write_text(path.with_name("000004.json").read_text())


DELTA, RHO, RECORD = "deltas.zarr/delta/c.2.0.0", "deltas.zarr/rho/c.2", "blocks/000002.json"
# Kind: the file, and what happens to it.
DAMAGE = {
    "a flipped bit": (DELTA, flip),
    "a flipped bit, the time kept": (DELTA, kept_time(flip)),
    "a small chunk flipped, the time kept": (RHO, kept_time(flip)),
    "cut short": (DELTA, cut),
    "emptied": (RHO, lambda path: path.write_bytes(b"")),
    "a chunk deleted": (DELTA, os.unlink),
    "a record without its chunks": (RECORD, no_chunks),
    "a record deleted": (RECORD, os.unlink),
    "a record cut short": (RECORD, halve),
    "a record of nothing": (RECORD, lambda path: path.write_text("[]\n")),
    "another block's record": (RECORD, other_record),
    "a sum in a record": (RECORD, other_sum),
    "a sum in a record, the time kept": (RECORD, kept_time(other_sum)),
}
LAYOUT = {
    "zarr.json cut short": ("deltas.zarr/delta/zarr.json", cut),
    "zarr.json deleted": ("deltas.zarr/delta/zarr.json", os.unlink),
    "zarr.json of nothing": ("deltas.zarr/rho/zarr.json", lambda path: path.write_text("{}")),
    "zarr.json with other chunks": ("deltas.zarr/delta/zarr.json", edited(r'("chunk_shape": \[\s*)4', r"\g<1>5")),
    "zarr.json with another separator": ("deltas.zarr/degenerate/zarr.json", edited(r'"separator": "\."', '"separator": "/"')),
    "zarr.json with another dtype": ("deltas.zarr/rho/zarr.json", edited('"float32"', '"float64"')),
    "the group's zarr.json cut short": ("deltas.zarr/zarr.json", cut),
    "the group's zarr.json deleted": ("deltas.zarr/zarr.json", os.unlink),
}
STRAYS = ["deltas.zarr/delta/c.2.0.0.77-88.tmp", "deltas.zarr/rho/c.1.partial", "blocks/000003.json.77.tmp", "begun.json.7.tmp"]


def damaged(folder, stage, kind):
    name, change = (DAMAGE | LAYOUT)[kind]
    path = folder.run / stage / name
    before = path.read_bytes()
    change(path)
    assert kind == "a record without its chunks" or not path.exists() or path.read_bytes() != before
    return name


def problems(ocd, folder, stage, code=3):
    return "\n".join(ocd.json(folder, "verify", code=code)["stages"][stage]["problems"])


def inodes(folder, stage, *but):
    """Of the files of all blocks but some."""
    files = [*(folder.run / stage / "deltas.zarr").rglob("c.*"), *blocks_of(folder, stage)]
    of = {path: int(path.stem if path.suffix == ".json" else path.name.split(".")[1]) for path in files}
    return {path.relative_to(folder.run / stage): path.stat().st_ino for path in files if of[path] not in but}
