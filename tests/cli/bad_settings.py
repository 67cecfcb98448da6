"""Bad input in settings and on the command line."""

from bad_input import Bad, written

# Settings that a table must not hold; what the message says of each.
TABLES = {
    "unknown key": ({"collect": {"stepps": 3}}, ["collect.stepps", "did you mean steps?"]),
    "unknown key far from all": ({"collect": {"zzz": 3}}, ["collect.zzz", "optimizer", "lr"]),
    "unknown table": ({"colect": {"steps": 3}}, ["[colect]", "did you mean collect?"]),
    "wrong type": ({"collect": {"lr": "fast"}}, ["collect.lr", "'fast'", "number"]),
    "a fraction for a count": ({"collect": {"steps": 2.5}}, ["collect.steps", "2.5", "integer"]),
    "a truth value for a count": ({"collect": {"steps": True}}, ["collect.steps", "True", "integer"]),
    "a text for a truth value": ({"infer": {"save_deltas": "yes"}}, ["infer.save_deltas", "'yes'", "boolean"]),
    "out of range": ({"collect": {"steps": 0}}, ["collect.steps", "0", "greater than or equal to 1"]),
    "out of an open range": ({"train-base": {"lr": 0}}, ["train-base.lr", "greater than 0"]),
    "no such choice": ({"collect": {"optimizer": "rmsprop"}}, ["collect.optimizer", "'rmsprop'", "'adam'", "'sgd'"]),
    "neither a number nor auto": (
        {"collect": {"batch_size": "large"}},
        # A setting of two possible types fails twice inside the checker; it is one problem.
        ["a problem", "collect.batch_size", "'large'", "integer", "'auto'"],
    ),
    "missing": ({"task": {"train": None}}, ["task.train is missing", "train.npz"]),
    "class beside model": ({"task": {"class": "mymodel:Own"}}, ["task.model", "task.class"]),
    "not module:name": ({"task": {"model": "mymodel.net"}}, ["task.model", "'mymodel.net'", "module:name"]),
    "all problems at once": (
        {"collect": {"steps": 0, "learning_rate": 1}, "infer": {"sampler": "euler"}, "infr": {"ensemble": 1}},
        ["4 problems", "collect.steps", "collect.learning_rate", "infer.sampler", "[infr]; did you mean infer?"],
    ),
}
# What --set must not be given.
SETS = {
    "collect": ["--set collect", "table.key=value", "for example"],
    "collect.lr": ["--set collect.lr", "table.key=value"],
    "lr=3": ["--set lr=3", "table.key=value"],
    "=3": ["--set =3", "table.key=value"],
    ".lr=3": ["--set .lr=3", "table.key=value"],
    "collect.=3": ["--set collect.=3", "table.key=value"],
    "collect.lr.x=3": ["--set collect.lr.x=3", "collect.lr is not a table"],
    "colect.lr=3": ["[colect]", "did you mean collect?"],
    "collect.larning_rate=3": ["collect.larning_rate"],
    "collect.lr=fast": ["collect.lr", "'fast'"],
    "collect.lr=": ["collect.lr", "''"],
    "collect.lr=inf": ["collect.lr", "inf"],
    "collect.lr=nan": ["collect.lr", "nan"],
    "collect.repeats=0": ["collect.repeats"],
    "collect.repeats=-1": ["collect.repeats"],
    "collect.repeats=1.5": ["collect.repeats"],
    'collect.repeats="all"': ["collect.repeats"],
    "evaluate.rows=miracle": ["evaluate.rows"],
    "infer.strength=strong": ["infer.strength = 'strong'", "'auto'"],
    "task.model_args.when=2020-01-01": ["task.model_args", "2020"],
    "task.model_args.width=inf": ["task.model_args", "inf"],
}
NO_PARTS = ["0/2", "3/2", "1", "a/b", "1/0", "-1/2", "1/2/3", "1.5/2", "1/", "%201/2", ""]


def nowhere(folder, patch):
    """The search goes upward and stops at the home directory, above which there are some."""
    (folder.root / "home" / "inner").mkdir(parents=True)
    patch.setenv("HOME", str(folder.root / "home"))
    patch.chdir(folder.root / "home" / "inner")


NOWHERE = ["no ocd.toml", "{root}/home/inner", "ocd init", "--config"]
FILES = [
    Bad("no settings up to home", "collect", NOWHERE, change=nowhere, config=False),
    Bad("named settings missing", "collect --config {root}/other.toml", ["other.toml", "ocd init"]),
    Bad(
        "broken toml",
        "status",
        ["ocd.toml", "not valid TOML", "line 2"],
        change=written("ocd.toml", '[task]\nmodel = "mymodel:net\n'),
    ),
    Bad(
        "a table that is none",
        "status",
        ["collect = 3", "[other]", "2 problems"],
        change=lambda folder, _: folder.config.write_text(
            "collect = 3\n" + folder.config.read_text().replace("[collect]", "[other]")
        ),
    ),
    Bad("no task", "status", ["[task] is missing"], change=written("ocd.toml", "[collect]\nsteps = 2\n")),
]
# A command and what it must not be asked.
WORDS = [
    Bad("until before from", "run --from infer --until collect", ["error: --until collect comes before --from infer"]),
    Bad("until no stage", "run --until colect", ["error: --until colect: unknown stage", "train-diffusion"]),
    Bad("from no stage", "run --from colect", ["error: --from colect: unknown stage", "train-diffusion"]),
    Bad("run finds missing data first", "run --set task.test=tst.npz", ["tst.npz is missing"]),
    Bad("run finds a missing layer first", "run --set select-layer.layer=fc9.weight", ["does not exist"]),
    *(
        Bad(f"infer {words}", f"infer {words}", [f"infer.{words.split()[0].strip('-').replace('-', '_')}"], finished=True)
        for words in ("--strength -1", "--strength nan")
    ),
    Bad("force skips no check", "collect --force --set collect.steps=0", ["collect.steps"], finished=True),
    Bad("evaluate a row unknown", "evaluate --add miracle", ["evaluate.rows", "alternative layer"], finished=True),
    Bad(
        "a layer that does not exist",
        "select-layer --force --layer 0.wieght",
        ["'0.wieght' does not exist", "did you mean 0.weight?", "2.weight (3, 6)", "name one of them, such as 0.weight"],
        finished=True,
        # What the message says to type works as it stands.
        then=["select-layer --force --layer 0.weight"],
    ),
    Bad(
        "a layer that is a vector",
        "select-layer --force --layer 0.bias",
        ["'0.bias' is a vector of 6", "0.weight (6, 4)", "2.weight (3, 6)"],
        finished=True,
    ),
    Bad(
        "probe no layer", "probe --layer 2.wieght", ["layer '2.wieght' does not exist (did you mean 2.weight?)"], finished=True
    ),
    *(
        Bad(
            f"adam with {key}",
            f"collect --force --set collect.{key}={value}",
            f"error: collect.{key} = {value} is of sgd, not of adam\n  use --set collect.optimizer=sgd\n",
            finished=True,
            then=[f"collect --force --set collect.{key}={value} --set collect.optimizer=sgd"],
        )
        for key, value in (("momentum", 0.9), ("weight_decay", 0.1))
    ),
    *(
        Bad(
            f"{stage} part {text!r}",
            f"{stage} --force --part={text}",
            f"error: --part {text.replace('%20', ' ')}: expected i/n with 1 <= i <= n\n  for example: --part 2/8\n",
            finished=True,
        )
        for stage in ("collect", "infer")
        for text in NO_PARTS
    ),
    *(
        Bad(
            f"more parts than blocks: {words}",
            f"{words} --force",
            f"error: --part {words.split()[-1]}: more parts than blocks, of which there are {blocks}\n"
            f"  use fewer parts, or smaller {smaller}=N\n",
            finished=True,
        )
        for stage, blocks, smaller in (
            ("collect --set collect.block_samples=4", 9, "blocks with --set collect.block_samples"),
            ("infer --set infer.batch_size=2", 12, "batches, of which blocks are made, with --set infer.batch_size"),
        )
        for words in (f"{stage} --part 1/{blocks + 1}", f"{stage} --dry-run --part {blocks + 1}/{blocks + 1}")
    ),
]
ROWS = [
    *FILES,
    *(Bad(name, "train-base", says, settings=settings) for name, (settings, says) in TABLES.items()),
    *(Bad(f"set {text}", f"train-base --set {text}", says) for text, says in SETS.items()),
    *WORDS,
]
