"""The tables of `evaluate` and `probe`, on stdout."""

from typing import Any

from rich.console import Console
from rich.table import Table


def show_evaluation(out: Console, summary: dict[str, Any]) -> None:
    """Rows, what is told beside them, and the verdict last."""
    found = summary["results"]
    metric = found["metric"]
    others = list(dict.fromkeys(name for row in found["rows"] for name in row["metrics"] if name != metric))
    table = Table("", "E", "strength", metric, "minus base [95 %]", *others)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in found["rows"]:
        figures = row["metrics"]
        strength = "" if row["strength"] is None else f"{row['strength']:g}{' ✓' if row['validated'] else ''}"
        cells = [_mean(figures.get(name)) for name in others]
        name = row["name"].replace("[", "\\[")
        table.add_row(name, str(row["members"]), strength, _with_error(figures[metric]), _interval(figures[metric]), *cells)
    out.print(table)
    out.print(
        f"{found['samples']:,} test samples; ✓: strength fitted on {found['validation_samples']:,} validation samples; "
        f"{metric}: mean ± standard error",
        markup=False,
    )
    for entry in found["left_out"]:
        out.print(f"left out: {entry['name']}: {entry['reason']}", markup=False)
    _memorisation(out, found["memorisation"])
    _cost(out, found["cost"])
    if "seeds" in found:
        show_seeds(out, found["seeds"])
    for text in found["warnings"]:
        out.print(f"warning: {text}", markup=False)
    out.print(found["verdict"], markup=False)


def _mean(entry: dict[str, Any] | None) -> str:
    return "" if entry is None or entry["mean"] is None else f"{entry['mean']:.4f}"


def _with_error(entry: dict[str, Any]) -> str:
    error = entry["standard_error"]
    return _mean(entry) + ("" if error is None else f" ± {error:.4f}")


def _interval(entry: dict[str, Any]) -> str:
    if entry["interval"] is None or entry["difference"] is None:
        return ""
    low, high = entry["interval"]
    return f"{entry['difference']:+.4f} \\[{low:+.4f}, {high:+.4f}]"


def _memorisation(out: Console, found: dict[str, Any]) -> None:
    classes = f", its class's mean {found['generated_class_mean']:.3f}" if "generated_class_mean" in found else ""
    out.print(
        f"cosine of a generated delta with the true one {found['generated_true']:.3f}, the nearest training delta "
        f"{found['generated_nearest']:.3f}{classes}, the mean {found['generated_mean']:.3f}; "
        f"of a true delta with its nearest training delta {found['true_nearest']:.3f}, of training deltas with their nearest "
        f"other {found['training_nearest']:.3f}; {found['copies']:.0%} of the generated are nearer to a training delta than "
        "95 % of those are to each other",
        markup=False,
    )


def _cost(out: Console, found: dict[str, Any]) -> None:
    stages = ", ".join(f"{name} {seconds:.0f}" for name, seconds in found["stage_seconds"].items())
    out.print(
        f"ms a sample: base {found['base_ms']:.3g}, one draw {found['ocd_one_draw_ms']:.3g}, ensemble "
        f"{found['ocd_ensemble_ms']:.3g}; parameters: base {found['parameters']['base']:,}, denoiser "
        f"{found['parameters']['denoiser']:,}; seconds: {stages}",
        markup=False,
    )


def show_seeds(out: Console, found: dict[str, Any]) -> None:
    """Mean ± standard deviation over whole trainings."""
    names = list(dict.fromkeys(name for row in found["rows"] for name in row["metrics"]))
    table = Table(f"{len(found['seeds'])} seeds", *names)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in found["rows"]:
        cells = [row["metrics"].get(name) for name in names]
        texts = ["" if cell is None else f"{cell['mean']:.4f} ± {cell['standard_deviation']:.4f}" for cell in cells]
        table.add_row(row["name"], *texts)
    out.print(table)
    for seed, text in zip(found["seeds"], found["verdicts"], strict=True):
        out.print(f"seed {seed}: {text}", markup=False)
