"""Bad input in run directories: stages that are missing or stale, folders of other things, records that lead astray."""

import json
import os
import shutil

from bad_input import Bad, written
from damage import edited, kept_time
from folders import flip

# The stages that each needs.
NEEDS = {
    "select-layer": ["train-base"],
    "collect": ["train-base", "select-layer"],
    "train-diffusion": ["train-base", "select-layer", "collect"],
    "train-scale": ["train-base", "select-layer", "collect"],
    "infer": ["train-base", "select-layer", "collect", "train-diffusion", "train-scale"],
    "evaluate": ["train-base", "select-layer", "collect", "train-diffusion", "train-scale"],
    "probe": ["train-base"],
}
LR = "collect.lr was 0.01, is now 0.02"
REDO = "ocd collect --set collect.lr=0.02 --force"


def changed(name, change):
    """A record of the run directory, with its JSON changed."""

    def write(folder, _):
        path = folder.run / name
        record = json.loads(path.read_text())
        change(record)
        path.write_text(json.dumps(record))

    return write


def replaced(name, text):
    """A record with another text, or none."""
    return lambda folder, _: (folder.run / name).unlink() if text is None else (folder.run / name).write_text(text)


def other_things(folder, _):
    (folder.root / "photos").mkdir()
    (folder.root / "photos" / "cat.jpg").write_text("")


def only_the_cat(folder, _):
    assert os.listdir(folder.root / "photos") == ["cat.jpg"]


def still_a_file(folder, _):
    assert (folder.root / "photos").read_text() == "kept"


def unfinished_without_record(folder, _):
    shutil.move(folder.run / "train-scale", folder.run / "train-scale.wip")
    (folder.run / "train-scale.wip" / "manifest.json").unlink()
    (folder.run / "train-scale.wip" / "begun.json").write_text("{")


def leading_out(name):
    def write(folder, patch):
        (folder.root / "secret").write_text("secret")
        if name == "link":
            (folder.run / "collect" / "link").symlink_to(folder.root / "secret")
        entry = {"size": 6, "mtime_ns": 0, "sha256": "0" * 64}
        changed("collect/manifest.json", lambda it: it["files"].update({name.format(root=folder.root): entry}))(folder, patch)

    return write


def unseen(stage, name, change):
    """Change a file so that neither its size nor its time tell, and let a stage be done again."""

    def write(folder, _):
        path = folder.run / name
        before = path.read_bytes()
        kept_time(change)(path)
        assert path.read_bytes() != before
        assert path.stat().st_size == len(before)
        shutil.rmtree(folder.run / stage)

    return write


def missing(stage, needed):
    asking = f"{'probing' if stage == 'probe' else stage} needs stages that are not done"
    says = [asking, *(f"{name} is missing" for name in needed), " && ".join(f"ocd {name}" for name in needed)]
    return Bad(f"{stage} before those it needs", stage, says, 3)


def on_finished(id, words, says, change=None, **named):
    return Bad(id, words, says, 3, finished=True, change=change, **named)


ORDER = [
    *(missing(stage, needed) for stage, needed in NEEDS.items()),
    Bad("run --from needs what comes before", "run --from collect", ["train-base is missing"], 3),
    Bad("a dry run refuses what the run would", "collect --dry-run", ["train-base is missing"], 3),
    on_finished("a stale stage", "collect --set collect.lr=0.02", ["collect is stale", LR, "--force"]),
    on_finished("a stale stage before train-scale", "train-scale --set collect.lr=0.02", ["collect is stale", LR, REDO]),
    on_finished("a stale stage before infer", "infer --set collect.lr=0.02", ["collect is stale", LR, REDO]),
    on_finished("force skips no check", "train-diffusion --force --set collect.lr=0.5", ["collect.lr was 0.01, is now 0.5"]),
    on_finished("a strength nobody fitted", "infer --strength auto", ["evaluate is missing", "run: ocd evaluate"]),
]
FOLDERS = [
    *(
        on_finished(
            f"{stage} in the run directory of another task",
            f"{stage} --set task.model=other:net",
            ["belongs to task 'mymodel:net'", "'other:net'", "--run"],
            lambda folder, _: shutil.copy(folder.root / "mymodel.py", folder.root / "other.py"),
        )
        for stage in ("train-base", "collect", "infer", "verify")
    ),
    on_finished(
        "a run directory of another format",
        "collect",
        ["format version 99", "expected 2", "--run"],
        changed("run.json", lambda it: it.update(format_version=99)),
    ),
    on_finished(
        "a stage of another format",
        "train-scale",
        ["collect", "format version 99", "expected 2"],
        changed("collect/manifest.json", lambda it: it["identity"].update(format_version=99)),
    ),
    Bad(
        "a folder of other things",
        "train-base --run {root}/photos",
        ["not a run directory", "cat.jpg", "--run"],
        3,
        change=other_things,
        mend=only_the_cat,
    ),
    Bad(
        "a file for a run directory",
        "train-base --run {root}/photos",
        ["is a file", "--run"],
        3,
        change=written("photos", "kept"),
        mend=still_a_file,
    ),
]
RECORDS = [
    on_finished("run.json is no JSON", "train-scale", ["run.json"], replaced("run.json", '{"format_version"')),
    on_finished(
        "a manifest is no JSON", "train-scale", ["manifest.json"], replaced("collect/manifest.json", '{"format_version"')
    ),
    *(
        on_finished(
            f"a manifest of {damage}",
            "train-scale",
            ["train-scale", "manifest.json", "--force"],
            replaced("train-scale/manifest.json", damage),
            then=["train-scale --force"],
        )
        for damage in ("{", "{}", "[]", None)
    ),
    on_finished(
        "a damaged record of unfinished work",
        "train-scale",
        ["begun.json", "--force"],
        unfinished_without_record,
        then=["train-scale --force"],
    ),
    *(
        on_finished(f"a manifest that leads to {name}", "train-scale", ["collect", name, "leads out"], leading_out(name))
        for name in ("../../secret", "{root}/secret", "link")
    ),
    *(
        on_finished(
            f"an array of another {what} than the manifest says",
            "train-scale",
            [name, "manifest says", "ocd collect --force"],
            unseen("train-scale", f"collect/deltas.zarr/{name}/zarr.json", change),
            begins=True,
        )
        for what, name, change in (
            ("shape", "delta", edited(r'("shape": *\[\s*)36', r"\g<1>99")),
            ("dtype", "rho", edited('"float32"', '"float64"')),
        )
    ),
    on_finished(
        "a chunk with a flipped byte",
        "train-scale",
        ["rho is damaged", "ocd verify names the blocks; ocd collect then redoes them"],
        unseen("train-scale", "collect/deltas.zarr/rho/c.0", flip),
        begins=True,
    ),
    # Inputs are hashed before they are read, so that damage which size and time do not show is no silent error.
    *(
        on_finished(
            f"{name} with a flipped byte",
            stage,
            [name.split("/")[0], "content changed"],
            unseen(stage, name, flip),
            begins=True,
        )
        for name, stage in (
            ("train-base/base.safetensors", "select-layer"),
            ("train-diffusion/denoiser.safetensors", "infer"),
            ("train-scale/scale.safetensors", "infer"),
        )
    ),
]
ROWS = [*ORDER, *FOLDERS, *RECORDS]
