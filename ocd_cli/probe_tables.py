"""The tables of `probe`, on stdout."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ocd_cli.text import bytes_text, duration, figure
from stages.foundation.numbers import signed

LABELS, MEAN, NEIGHBOURS = "overfitted on test", "mean delta", "nearest"
# Of the verdict's figures, as `chosen` has them.
NEIGHBOURS_CHOSEN, LABELS_CHOSEN = "neighbours", "labels"
# A recipe in one line.
SHORTEST_NAME = 15


def show_probe(out: Console, found: dict[str, Any]) -> None:
    """What was tried, what a full run would cost, the verdict, and last what to type next."""
    base = _loss(_rows(found, found["tried"][0])["base"])
    out.print(
        f"base: {found['metric']} {base} on {found['samples']:,} held-out samples; neighbours are looked for among "
        f"{found['searched']:,} training samples"
    )
    out.print(_trials(found))
    out.print(
        "labels: the deltas of the true labels, for reference; two strengths: one for each half of the samples, chosen on the "
        "other half (* the largest tried). The best of so many rows looks better than it is, so the verdict has figures of its "
        "own: each half chooses, and the other half is measured."
    )
    out.print(_costs(found))
    for entry in found["left_out"]:
        out.print(f"left out: {entry['name']}: {entry['reason']}")
    for text in found["warnings"]:
        out.print(f"warning: {text}")
    for name in (NEIGHBOURS_CHOSEN, LABELS_CHOSEN):
        first, second = (_choice(choice) for choice in found["chosen"][name]["favoured"])
        said = f"both halves choose {first}" if first == second else f"one half chooses {first}; the other {second}"
        out.print(f"{name}: {said}")
    out.print(found["verdict"])
    if small := found["small_run"]:
        out.print(_small_run(small))
    if found["start_with"]:
        _next(out, found)
    elif found["unchanged"]:
        out.print(f"nothing to recommend: {found['unchanged']} stays as it is", soft_wrap=True)


def _small_run(small: dict[str, Any]) -> str:
    """What OCD gained that was trained on a few samples."""
    ways = ", and ".join(f"to {figure(way['mean'])} {name} ({_difference(way, 99)})" for name, way in small["ways"].items())
    return (
        f"a small run with {small['start']['select-layer.layer']}, {small['samples']:,} samples and {small['steps']:,} steps: "
        f"the task's loss goes from {figure(small['base'])} {ways}"
    )


def _choice(choice: dict[str, Any]) -> str:
    """What a half of the samples favours, in words; at strength 0 every layer and recipe is the base."""
    if choice["strength"] == 0:
        return "no delta, for none is sure to gain"
    row = "" if choice["row"] == LABELS else f", {choice['row']} × {choice['strength']:g}"
    return f"{choice['layer']}, {_recipe(choice['settings'])}{row}"


def _recipe(settings: dict[str, Any]) -> str:
    return f"{settings['optimizer']} {settings['lr']:g} × {settings['steps']}"


def _trials(found: dict[str, Any]) -> Table:
    """A trial a row, under its layer: the best row of the neighbours beside the labels and the mean delta."""
    table = _table("layer\nsettings", "labels", "mean\ndelta", "neighbours", "their best row × strengths\nminus base [95 %]")
    table.columns[-1].justify, table.columns[-1].no_wrap = "left", False
    for layer in _layers(found):
        table.add_row(layer)
        for trial in found["tried"]:
            if trial["layer"] != layer:
                continue
            rows = _rows(found, trial)
            name = _best(rows, trial["strengths"])
            strengths = _strengths(trial["strengths"][name], max(found["strengths"]))
            table.add_row(
                _recipe(trial["settings"]),
                *(_loss(rows[shown]) for shown in (LABELS, MEAN, name)),
                f"{name} × {strengths}\n{_difference(rows[name])}",
            )
    return table


def _costs(found: dict[str, Any]) -> Table:
    """What a full run would take at most, a layer a row."""
    table = _table("a full run with", "collect", "writes", "denoiser")
    for layer in _layers(found):
        costs = [trial["cost"] for trial in found["tried"] if trial["layer"] == layer]
        steps = [cost["train_diffusion_seconds"] for cost in costs]
        table.add_row(
            layer,
            duration(max(cost["collect_seconds"] for cost in costs)),
            bytes_text(max(cost["collect_bytes"] for cost in costs)),
            "too large" if None in steps else f"≤ {duration(max(steps))}",
        )
    return table


def _table(first: str, *names: str) -> Table:
    """A column of names, which are broken where there is no room, and columns of numbers, which never are."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(first, overflow="fold", min_width=SHORTEST_NAME)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _layers(found: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(trial["layer"] for trial in found["tried"]))


def _rows(found: dict[str, Any], trial: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row["metrics"][found["metric"]] for row in trial["rows"]}


def _best(rows: dict[str, dict[str, Any]], strengths: dict[str, Any]) -> str:
    """The neighbours' row with the lowest loss."""
    losses = {name: rows[name]["mean"] for name in strengths if name.startswith(NEIGHBOURS)}
    return min(losses, key=lambda name: float("inf") if losses[name] is None else losses[name])


def _loss(entry: dict[str, Any]) -> str:
    return "not finite" if entry["mean"] is None else figure(entry["mean"])


def _difference(entry: dict[str, Any], share: int | None = None) -> str:
    if entry["difference"] is None or entry["interval"] is None:
        return ""
    low, high = map(signed, entry["interval"])
    of_what = "" if share is None else f", {share} % interval"
    return f"{signed(entry['difference'])}{of_what} [{low}, {high}]"


def _strengths(strengths: list[float], largest: float) -> str:
    """One number where both halves have the same."""
    return ", ".join(f"{strength:g}{'*' * (strength == largest)}" for strength in dict.fromkeys(strengths))


def _next(out: Console, found: dict[str, Any]) -> None:
    """Flags to paste; in one line, so that they can be."""
    if found["written"]:
        values = ", ".join(f"{name} = {value}" for name, value in found["start_with"].items())
        out.print(f"written into {found['written']}: {values}", soft_wrap=True)
        out.print(f"next: {found['next']}", soft_wrap=True)
    else:
        out.print("next: ocd probe --write, or give every command that follows these flags:")
        out.print(found["next"], soft_wrap=True)
