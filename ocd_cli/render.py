"""Results as people read them, on stdout."""

import shutil
import sys
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from ocd_cli.tables import NARROW, figures_table, show_evaluation
from ocd_cli.text import bytes_text, figure
from stages.lifecycle.results import CommandResult
from stages.run_directory.pipeline import OWN_ROW, STAGES

BAR_WIDTH = 30
_COLOURS = {"done": "green", "partial": "yellow", "stale": "red", "missing": "dim"}


def console() -> Console:
    """Stdout, for text as it is; where it is no terminal, wide enough that nothing is cut."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 180
    return Console(width=width, markup=False, highlight=False)


def show_result(result: CommandResult) -> None:
    out = console()
    if result.planned:
        size = result.summary.get("bytes")
        disk = f", {bytes_text(size)} on disk at most" if size else ""
        force = "; needs --force" if result.summary["state"] == "stale" and not STAGES[result.stage].redoes_stale else ""
        out.print(f"{result.stage} ({result.summary['state']}{force}): {result.summary['what']}{disk}")
        return
    if result.waits:
        found = result.summary
        out.print(
            f"{result.stage}: part {found['part']} is done; {found['done']:,} of {found['total']:,} {found['unit']} are "
            "there, the others are other parts' work"
        )
        return
    if result.up_to_date:
        out.print(f"{result.stage}: up to date ({result.path})")
    show = {
        "train-base": _train_base,
        "select-layer": _select_layer,
        "collect": _collect,
        "train-diffusion": _training,
        "train-scale": _scale,
        "infer": _infer,
        "evaluate": show_evaluation,
    }
    show[result.stage](out, result.summary)
    if count := result.summary.get("pictures"):
        out.print(f"pictures of {count:,} inputs: {result.path / 'pictures'}")
    if not result.up_to_date:
        out.print(f"{result.stage}: done ({result.path})")


def _metrics(out: Console, rows: dict[str, dict[str, float]]) -> None:
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    table = figures_table("", *names)
    for row, figures in rows.items():
        values = [figures.get(name) for name in names]
        table.add_row(row, *("" if value is None else figure(value) for value in values))
    out.print(table)


def _samples(count: int, kind: str = "") -> str:
    """A number of samples, in words."""
    return f"{count:,} {kind}sample{'s' * (count != 1)}"


def _train_base(out: Console, summary: dict[str, Any]) -> None:
    how = (
        f"imported from {summary['imported']}"
        if "imported" in summary
        else f"trained {summary.get('epochs', '')} epochs, best {summary['best_epoch']}"
        if "epochs" in summary
        else "trained by the task"
    )
    out.print(f"base: {summary['parameters']:,} parameters, {how}")
    # Summaries of before have neither counts nor warnings.
    counts = {split: summary.get(f"{split}_samples") for split in ("validation", "test")}
    _metrics(out, {split + (f" ({_samples(count)})" if count else ""): summary[split] for split, count in counts.items()})
    for text in summary.get("warnings", []):
        out.print(f"warning: {text}")


def _select_layer(out: Console, summary: dict[str, Any]) -> None:
    rows = summary["candidates"]
    scores = [row["score"] for row in rows if row["score"] is not None]
    narrow = out.width < NARROW
    bars = BAR_WIDTH // 4 if narrow else BAR_WIDTH
    table = Table(Column("layer", overflow="fold"), "shape", "score", "", "rank", "keeps\nits rank", "loss\nspread")
    for column in table.columns[1:]:
        column.no_wrap = True
    for row in rows:
        mark = "▶ " if row["name"] == summary["layer"] else "  "
        shape = "×".join(map(str, row["shape"]))
        if row["score"] is None:
            table.add_row(mark + row["name"], shape, "not scored", "", "", "", "")
            continue
        share = (row["score"] - min(scores)) / (max(scores) - min(scores) or 1)
        bar = "█" * (1 + round(share * (bars - 1)))
        table.add_row(
            mark + row["name"],
            shape,
            f"{row['score']:.2f}",
            bar,
            str(row["rank"]),
            f"{row['rank_stability']:.0%}",
            f"{row['loss_spread']:.3g}",
        )
    out.print(table)
    why = (
        "named in the settings"
        if summary["chosen_by"] == "setting"
        else "highest score (entropy of the loss in nats, summed over samples)"
    )
    out.print(f"layer: {summary['layer']} ({why})")


def _collect(out: Console, summary: dict[str, Any]) -> None:
    shape = "×".join(map(str, summary["shape"]))
    degenerate = f", {summary['degenerate']:,} degenerate (fitted already)" if summary["degenerate"] else ""
    degenerate += f", {len(summary['skipped']):,} left out (not finite)" if summary["skipped"] else ""
    repeats = summary.get("repeats", 1)
    each = f", {repeats:,} of each sample" if repeats > 1 else ""
    out.print(
        f"deltas: {repeats * summary['samples']:,} of {summary['layer']} ({shape}){each}, by {summary['method']}{degenerate}"
    )
    of = {"train": "training ", "validation": "held-out "}.get(summary.get("split", "train"), "")
    out.print(
        f"mean loss of {_samples(summary['samples'] - len(summary['skipped']), of)}: {figure(summary['base_loss'])} before, "
        f"{figure(summary['overfit_loss'])} after; mean rho {figure(summary['rho'])}"
    )
    if summary["until_converged"]:
        out.print(f"mean steps: {figure(summary['steps'])}")
    for name, how in summary["pooled"].items():
        out.print(f"{name}: {how}")


def _training(out: Console, summary: dict[str, Any]) -> None:
    why = ", stopped early" if summary["stopped_early"] else ""
    out.print(
        f"denoiser: {summary['preset']}, {summary['parameters']:,} parameters, {summary['steps']:,} steps{why}, "
        f"best at {summary['best_step']:,}"
    )
    # Summaries of before do not say of how many samples they are.
    held_out, compared = (summary.get(name) for name in ("held_out_samples", "cosine_samples"))
    if summary["prediction"] == "mean":
        means = "1 is knowing nothing"
    else:
        means = "mean over all noise levels; where the noise is weak, the denoiser sees most of the delta"
    of = f" of {_samples(held_out)}" if held_out else ""
    out.print(f"held-out loss {figure(summary['held_out_loss'])}{of} ({means})")
    of = f", of {_samples(compared, 'held-out ')}" if compared else ""
    out.print(
        f"cosine of a generated delta with the true one {figure(summary['cosine'])}, "
        f"with another sample's conditioning {figure(summary['cosine_shuffled'])}{of}"
    )
    if "held_out_task_loss" in summary:
        found, judged = figure(summary["held_out_task_loss"]), summary.get("judged_samples")
        of = f", of {_samples(judged, '')}" if judged else ""
        out.print(f"held-out loss of the task with generated deltas {found} (the base: 1 on average{of})")
        if summary["held_out_task_loss"] >= 1:
            out.print("that is no better than the base: expect no gain")
        out.print(_of_tuning(summary["best_step"], summary.get("tuned_from", 0)))
    elif (used := summary.get("uses_conditioning", True)) is None:
        out.print(f"{_samples(compared, 'held-out ')} do not tell whether a sample's own conditioning is used")
    elif not used:
        out.print("the denoiser has learned little or nothing from the conditioning: expect no gain")


def _of_tuning(kept: int, began: int | None) -> str:
    """What tuning did to the weights of the step that is kept; of a run of before it is not known when it began."""
    if began is None:
        return "nothing is tuned: the training ended before tuning began"
    if kept <= began > 0:
        return f"tuning from step {began:,} on lowered it no further: the weights of step {kept:,} are kept"
    return "tuned by that loss, deltas need not be near the true ones"


def _scale(out: Console, summary: dict[str, Any]) -> None:
    verdict = "beats" if summary["beats_constant"] else "does not beat"
    held_out = summary.get("held_out_samples")
    over = f" over {_samples(held_out, 'held-out ')}" if held_out else ""
    if summary["correlation"] is None:
        correlation = f"too few held-out samples ({held_out}) for a correlation"
    else:
        correlation = f"correlation of log rho {figure(summary['correlation'])}{over}"
    out.print(
        f"scale: {correlation}; error {figure(summary['error'])} {verdict} the constant mean's "
        f"{figure(summary['constant_error'])}"
    )


def _infer(out: Console, summary: dict[str, Any]) -> None:
    strength = f", strength {summary['strength']:g}" if summary["strength"] not in (None, 1.0) else ""
    row = summary.get("row", OWN_ROW)
    how = f"{summary['ensemble']} members" if row == OWN_ROW else row
    out.print(f"{summary['query']}: {summary['inputs']:,} inputs × {how}{strength}")
    if summary["metrics"] is None:
        out.print("no labels, so no metrics")
    else:
        rows = {
            f"{row} of {summary['ensemble']}" if row == "ocd ensemble" else row: figures
            for row, figures in summary["metrics"].items()
        }
        _metrics(out, rows)


def show_status(found: dict[str, Any]) -> None:
    """The states of all stages."""
    out = console()
    table = Table("stage", "state", "")
    for name, entry in found["stages"].items():
        progress = entry["progress"]
        text = f"{progress['done']:,} of {progress['total']:,} {progress['unit']}" if progress else ""
        if progress and "best_held_out_loss" in progress:
            text += f", best held-out loss {figure(progress['best_held_out_loss'])}"
        detail = entry["detail"] if entry["state"] != "partial" or not text else text
        detail = "; ".join(filter(None, [detail, *(f"in use by {user}" for user in entry["in_use_by"])]))
        table.add_row(name, Text(entry["state"], _COLOURS[entry["state"]]), detail)
    out.print(f"run directory: {found['run']}")
    out.print(table)
    if found["queries"]:
        out.print(f"other answers: {', '.join(found['queries'])}")


def show_verified(found: dict[str, Any]) -> None:
    out = console()
    for name, entry in found["stages"].items():
        verdict = "whole" if not entry["problems"] else f"{len(entry['problems'])} problems"
        shown = f"{name} (unfinished)" if name.endswith(".wip") else name
        out.print(f"{shown}: {entry['files']:,} files, {bytes_text(entry['bytes'])}, {verdict}")
        for line in entry["problems"]:
            out.print(f"  {line}")
    if not found["stages"]:
        out.print("nothing to verify: no stage is done")
