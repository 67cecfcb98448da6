"""The commands of `ocd`: each parses, makes one library call, and renders what it returns."""

import importlib.metadata
import signal
import sys
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ocd_cli.options import Shared, command, print_json, tell
from ocd_cli.progress import ShownProgress
from ocd_cli.render import console, show_result, show_status, show_verified
from ocd_cli.streams import settle_streams
from stages.foundation.allocator import keep_freed_memory
from stages.foundation.errors import TryAgainError
from stages.foundation.interruption import SIGNALS
from stages.lifecycle.results import CommandResult, command_of

app = typer.Typer(name="ocd", no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
PartOfBlocks = Annotated[
    str | None, typer.Option(help="Do the i-th of n parts of the blocks, beside other processes that do theirs.", metavar="I/N")
]


def _version(asked: bool) -> None:
    if asked:
        print(importlib.metadata.version("torch-ocd"))
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)] = False,
) -> None:
    """Give a trained PyTorch model input-dependent weights: overfit one layer on each training sample, learn to predict the
    change, apply it."""


def main() -> None:
    """Run the command line. Requests to end, of whatever kind, are interruptions: the run can go on."""
    keep_freed_memory()
    settle_streams()
    for number in SIGNALS:
        # One that is ignored, as nohup has SIGHUP ignored, stays so.
        if number != signal.SIGINT and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)
    try:
        try:
            app(prog_name="ocd")
        finally:
            sys.stdout.flush()
    except TryAgainError as error:
        raise SystemExit(tell(error)) from None


def _interrupt(number: int, frame: object) -> None:
    # Once is enough: SIGXCPU comes every second, also while what is finished is put away.
    signal.signal(number, lambda *_: None)
    raise KeyboardInterrupt


def _stage(shared: Shared, name: str, given: Mapping[str, Any] | None = None, **asked: Any) -> None:
    """Run one stage with progress shown, and print its result; `given` are settings that flags of its own give."""
    project = shared.project(given)
    with closing(ShownProgress(shared.quiet)) as report:
        result = command_of(name)(project, **asked, force=shared.force, dry_run=shared.dry_run, report=report)
    _print(shared, result)
    if shared.as_json and not result.follows:
        print_json(result.summary)


def _print(shared: Shared, result: CommandResult) -> None:
    """For people; with --json, on stderr, only that there was nothing to do."""
    if result.follows:
        return
    if not shared.as_json:
        show_result(result)
    elif result.up_to_date and not shared.quiet:
        print(f"{result.stage}: up to date", file=sys.stderr)


@command(
    app,
    "init",
    "ocd init --set task.model=mymodel:Net --set task.loss=mse --set task.train=train.npz --set task.test=test.npz",
)
def init(shared: Shared) -> None:
    """Write a commented ocd.toml that works as it stands; --set, --seed, --device and --run are written into it."""
    from stages.init import init as write_config

    found = write_config(
        shared.config or Path.cwd(),
        overrides=shared.overrides or (),
        values=shared.values({"run.directory": str(shared.run) if shared.run else None}),
        force=shared.force,
        dry_run=shared.dry_run,
    )
    if shared.as_json:
        print_json({"path": found["path"], "written": found["written"]})
    elif shared.dry_run:
        print(found["text"], end="")
    else:
        print(f"wrote {found['path']}; next: ocd run")


@command(app, "train-base", "ocd train-base --weights lenet5.pt")
def train_base(
    shared: Shared,
    weights: Annotated[
        Path | None,
        typer.Option(
            help="Import these weights (.safetensors, .pt, .index.json, a folder) instead of training.",
            metavar="FILE",
        ),
    ] = None,
    weights_key: Annotated[str | None, typer.Option(help="Take this entry of --weights.", metavar="NAME")] = None,
) -> None:
    """Train the base model, or import its weights; prints its metrics on the test split."""
    given = {"task.weights": str(weights.absolute()) if weights else None, "task.weights_key": weights_key}
    _stage(shared, "train-base", given)


@command(app, "select-layer", "ocd select-layer --layer fc1.weight")
def select_layer(
    shared: Shared,
    layer: Annotated[
        str | None,
        typer.Option(
            help="Take this parameter, whatever the scores; later commands need it, too: write it into ocd.toml.",
            metavar="NAME",
        ),
    ] = None,
) -> None:
    """Score every layer by the entropy of the loss under perturbation (Eq. 6), and choose one."""
    _stage(shared, "select-layer", {"select-layer.layer": layer or None})
    if layer and not shared.quiet:
        print(f'for the commands that follow, write it into ocd.toml: [select-layer] layer = "{layer}"', file=sys.stderr)


@command(app, "collect", "ocd collect --set collect.samples=5000")
def collect(
    shared: Shared,
    part: PartOfBlocks = None,
) -> None:
    """Overfit the layer on each training sample, and store deltas and conditioning. Killed, it continues where it was."""
    _stage(shared, "collect", part=part)


@command(app, "train-diffusion", "ocd train-diffusion --set train-diffusion.max_steps=20000")
def train_diffusion(shared: Shared) -> None:
    """Train the diffusion model of the deltas' directions. Killed, it continues from its last checkpoint; asked to stop (by
    Ctrl-C, SIGTERM, SIGUSR1 …), it writes one first. Under torchrun, several processes share each batch."""
    _stage(shared, "train-diffusion")


@command(app, "train-scale", "ocd train-scale")
def train_scale(shared: Shared) -> None:
    """Train the network for the deltas' lengths. Killed, it continues from its last checkpoint; asked to stop, it writes one
    first."""
    _stage(shared, "train-scale")


@command(app, "infer", "ocd infer --input new.npz --ensemble 5")
def infer(
    shared: Shared,
    split: Annotated[Literal["test", "validation", "train"], typer.Option(help="Predict for this split of the task.")] = "test",
    input_file: Annotated[
        Path | None,
        typer.Option(
            "--input",
            help="Predict for the x of this npz file, or for the array of this npy file; labels are not needed.",
            metavar="FILE",
        ),
    ] = None,
    ensemble: Annotated[int | None, typer.Option(help="Deltas sampled for each input.", min=1)] = None,
    sample_steps: Annotated[int | None, typer.Option(help="Steps of the sampler.", min=1)] = None,
    sampler: Annotated[
        Literal["ddim", "ddpm"] | None, typer.Option(help="Deterministic after its first noise, or ancestral.")
    ] = None,
    strength: Annotated[
        str | None,
        typer.Option(help="Factor on the predicted length; 0 is the base, auto what evaluate fitted.", metavar="NUMBER"),
    ] = None,
    row: Annotated[
        str | None,
        typer.Option(help="Predict as this row of evaluate does; auto: the best on validation samples.", metavar="NAME"),
    ] = None,
    save_deltas: Annotated[bool, typer.Option("--save-deltas", help="Also write every sampled delta.")] = False,
    part: PartOfBlocks = None,
) -> None:
    """Sample deltas from the inputs alone, apply them, predict; with labels, print metrics of base, one draw and ensemble.
    Killed, it continues where it was."""
    given = {
        "infer.ensemble": ensemble,
        "infer.sample_steps": sample_steps,
        "infer.sampler": sampler,
        "infer.strength": _number_or_word(strength),
        "infer.row": row,
        "infer.save_deltas": save_deltas or None,
    }
    _stage(shared, "infer", given, split=split, input_file=input_file, part=part)


def _number_or_word(text: str | None) -> float | str | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return text


@command(app, "run", "ocd run --until collect")
def run(
    shared: Shared,
    start: Annotated[str | None, typer.Option("--from", help="First stage, included.", metavar="STAGE")] = None,
    until: Annotated[str | None, typer.Option(help="Last stage, included.", metavar="STAGE")] = None,
) -> None:
    """Bring train-base, select-layer, collect, train-diffusion, train-scale and infer up to date, in order; evaluate, too,
    where it is named, or infer.strength is auto, or infer.row another than "ocd ensemble"."""
    from stages.run import run as run_stages

    project = shared.project()
    summaries: dict[str, Any] = {}
    with closing(ShownProgress(shared.quiet)) as report:
        for result in run_stages(project, start, until, force=shared.force, dry_run=shared.dry_run, report=report):
            summaries[result.stage] = result.summary
            report.close()
            _print(shared, result)
    if shared.as_json:
        print_json({"stages": summaries})


@command(app, "evaluate", "ocd evaluate --seeds 3")
def evaluate(
    shared: Shared,
    seeds: Annotated[int | None, typer.Option(help="Whole trainings with as many seeds, for mean ± SD.", min=1)] = None,
    add: Annotated[
        list[str] | None, typer.Option("--add", help="Add a row that costs a training; repeatable.", metavar="ROW")
    ] = None,
) -> None:
    """Compare OCD with the base and with what a sceptic would try, on the labelled test split: table, intervals, verdict."""
    _stage(shared, "evaluate", {"evaluate.seeds": seeds, "evaluate.rows": list(add) if add else None})


@command(app, "probe", "ocd probe --layer fc1.weight")
def probe(
    shared: Shared,
    layer: Annotated[list[str] | None, typer.Option(help="Try this parameter only; repeatable.", metavar="NAME")] = None,
    samples: Annotated[int | None, typer.Option(help="Held-out samples to look at (default: 400).", min=8)] = None,
    write: Annotated[bool, typer.Option("--write", help="Write what to start with into the settings file.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Without the small run, which trains OCD on 600 samples.")] = False,
) -> None:
    """Before anything costly: is there something to gain? Tries layers and settings on held-out samples; needs the base."""
    from ocd_cli.probe_tables import show_probe
    from stages.probe import probe as try_layers

    project = shared.project()
    with closing(ShownProgress(shared.quiet)) as report:
        report.start("probe")
        options = {"layers": layer or (), "samples": samples, "write": write, "quick": quick, "dry_run": shared.dry_run}
        found = try_layers(project, **options, report=report)
    if shared.as_json:
        print_json(found)
    elif shared.dry_run:
        print(f"probe: {found['what']}")
    else:
        show_probe(console(), found)


@command(app, "status", "ocd status --json")
def status(shared: Shared) -> None:
    """Show each stage as missing, partial (how far), stale (what changed) or done."""
    from stages.status import status as find_status

    found = find_status(shared.project())
    if shared.as_json:
        print_json(found)
    else:
        show_status(found)


@command(app, "verify", "ocd verify")
def verify(shared: Shared) -> None:
    """Hash every artifact again and name what is damaged; exit code 3 if anything is."""
    from stages.verify import verify as check

    project = shared.project()
    with closing(ShownProgress(shared.quiet)) as report:
        report.start("verify")
        found = check(project, report=report)
    if shared.as_json:
        print_json(found)
    else:
        show_verified(found)
    if not found["whole"]:
        print("ocd collect redoes its damaged blocks, other stages are redone with: ocd <stage> --force;", file=sys.stderr)
        print("files that no manifest names may be deleted", file=sys.stderr)
        raise typer.Exit(3)
