"""The tables of `evaluate`, on stdout."""

from typing import Any

from rich.console import Console
from rich.table import Column, Table

from ocd_cli.text import figure
from stages.foundation.numbers import ROUNDING, signed

# A row's name is never broken within a word.
LONGEST_WORD = 12
# Below this width an interval stands under its difference.
NARROW = 100
# Columns that a table always has take about so many characters, and each further metric so many.
FIXED_WIDTH, METRIC_WIDTH = 86, 14


def figures_table(first: str, *names: str) -> Table:
    """A table whose columns after the first hold figures."""
    return Table(first, *(Column(name, justify="right") for name in names))


def show_evaluation(out: Console, found: dict[str, Any]) -> None:
    """Rows, what is told beside them, and the verdict last."""
    metric = found["metric"]
    others = list(dict.fromkeys(name for row in found["rows"] for name in row["metrics"] if name != metric))
    shown = others[: max(0, (out.width - FIXED_WIDTH) // METRIC_WIDTH)]
    table = figures_table("", "E", "strength", *(name.replace("_", " ") for name in (metric, "minus base [95 %]", *shown)))
    # Where there is little room, it is the rows' names that take two lines.
    for number in (2, 3, 4):
        table.columns[number].no_wrap = True
    table.columns[0].min_width, table.columns[0].overflow = LONGEST_WORD, "fold"
    base = found["rows"][0]["metrics"][metric]["mean"]
    for row in found["rows"]:
        figures = row["metrics"]
        strength = "" if row["strength"] is None else f"{row['strength']:g}{' ✓' if row['validated'] else ''}"
        cells = [_mean(figures.get(name)) for name in shown]
        loss, error = figures[metric], figures[metric]["standard_error"]
        mean = _mean(loss) + ("" if error is None else f" ± {error:.2g}")
        difference = "" if row["name"] == "base" else _interval(loss, ROUNDING * abs(base or 0), narrow=out.width < NARROW)
        table.add_row(row["name"], str(row["members"]), strength, mean, difference, *cells)
    out.print(table)
    fitted = (
        f"✓: strength fitted on {found['validation_samples']:,} validation samples; " if found["validation_samples"] else ""
    )
    out.print(f"{found['samples']:,} test samples; {fitted}{metric}: mean ± standard error")
    if len(shown) < len(others):
        out.print(f"not shown for want of width: {', '.join(others[len(shown) :])}; results.json has them")
    for entry in found["left_out"]:
        out.print(f"left out: {entry['name']}: {entry['reason']}")
    _memorisation(out, found["memorisation"])
    _cost(out, found["cost"])
    if "seeds" in found:
        show_seeds(out, found["seeds"])
    for text in found["warnings"]:
        out.print(f"warning: {text}")
    of_seed = f"seed {found['seed']}: " if "seeds" in found else ""
    out.print(of_seed + found["verdict"])
    out.print(f"next: {found['next']}")


def _mean(entry: dict[str, Any] | None) -> str:
    return "" if entry is None or entry["mean"] is None else figure(entry["mean"])


def _interval(entry: dict[str, Any], smallest: float, *, narrow: bool) -> str:
    """A difference and its interval, where it is narrow in two lines; less than `smallest` is nothing."""
    if entry["interval"] is None or entry["difference"] is None:
        return ""
    difference, low, high = (
        "0" if abs(value) < smallest else signed(value) for value in (entry["difference"], *entry["interval"])
    )
    return f"{difference}{chr(10) if narrow else ' '}[{low}, {high}]"


def _memorisation(out: Console, found: dict[str, Any]) -> None:
    classes = f", with its class's mean {found['generated_class_mean']:.3f}" if "generated_class_mean" in found else ""
    out.print(
        f"cosine of a generated delta with the true one {found['generated_true']:.3f}, with the nearest training delta "
        f"{found['generated_nearest']:.3f}{classes}, with the mean of all {found['generated_mean']:.3f}"
    )
    out.print(
        f"cosine of a true delta with its nearest training delta {found['true_nearest']:.3f}, of a training delta with its "
        f"nearest other {found['training_nearest']:.3f}"
    )
    out.print(
        f"{100 * found['copies']:.0f} % of the generated deltas look like copies: they are nearer to a training delta than "
        "95 % of those are to each other"
    )


def _cost(out: Console, found: dict[str, Any]) -> None:
    stages = ", ".join(f"{name} {seconds:.0f}" for name, seconds in found["stage_seconds"].items())
    out.print(
        f"ms a sample: base {found['base_ms']:.3g}, one draw {found['ocd_one_draw_ms']:.3g}, ensemble "
        f"{found['ocd_ensemble_ms']:.3g}; parameters: base {found['parameters']['base']:,}, denoiser "
        f"{found['parameters']['denoiser']:,}; seconds a stage took (its last process): {stages}"
    )


def show_seeds(out: Console, found: dict[str, Any]) -> None:
    names = list(dict.fromkeys(name for row in found["rows"] for name in row["metrics"]))
    table = figures_table(f"{len(found['seeds'])} seeds", *names)
    for row in found["rows"]:
        cells = [row["metrics"].get(name) for name in names]
        texts = ["" if cell is None else f"{figure(cell['mean'])} ± {cell['standard_deviation']:.2g}" for cell in cells]
        table.add_row(row["name"], *texts)
    out.print(table)
    for seed, text in zip(found["seeds"], found["verdicts"], strict=True):
        out.print(f"seed {seed}: {text}")
