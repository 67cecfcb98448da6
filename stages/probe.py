"""probe: before anything costly, is there something to gain? Tries layers and settings on a few held-out samples."""

import functools
import time
from collections.abc import Sequence
from typing import Any

from stages.evaluation.choosing import CHOSEN, NEIGHBOURS, Trial, choice_of, choose
from stages.evaluation.comparison import seeded_order
from stages.evaluation.headroom import headroom, settings_text, start_of
from stages.evaluation.small_run import small_run
from stages.evaluation.statistics import FEWEST_SAMPLES
from stages.evaluation.subject import EvaluatedSamples
from stages.evaluation.trials import LARGEST_BATCH, RESAMPLES, STRENGTHS, Trials
from stages.foundation.errors import DataError, OcdError
from stages.foundation.memory import AtOnce, free_on_gpu
from stages.foundation.progress import Report, Silent
from stages.foundation.threads import set_threads, threads_restored
from stages.foundation.torch_state import usual_torch
from stages.lifecycle.context import GIVE_VALIDATION, PROBABLY_SEEN, RunContext
from stages.per_sample.layer import Layer, candidates, find_layer
from stages.run_directory.folders import check_run
from stages.run_directory.pipeline import AUTO
from stages.run_directory.project import Project, as_flags, parse_override, set_flags
from stages.run_directory.settings_file import require_writable, write_settings
from stages.run_directory.states import States, require_done
from stages.tasks.checks import check_task

# What is tried beside the settings of `[collect]`.
GRID: tuple[dict[str, Any], ...] = (
    {"optimizer": "adam", "lr": 5e-4, "steps": 3},
    {"optimizer": "sgd", "lr": 5e-3, "steps": 3},
    {"optimizer": "adam", "lr": 2e-3, "steps": 3},
    {"optimizer": "sgd", "lr": 5e-2, "steps": 3},
)
# What the grid's settings are without, whatever `[collect]` has.
PLAIN: dict[str, Any] = {"momentum": 0.0, "weight_decay": 0.0, "until_converged": False}
SAMPLES, BUDGET_S = 400, 60.0
BATCH_BYTES, GPU_SHARE, LARGEST_ON_GPU = 128 << 20, 0.1, 512


@usual_torch()
def probe(
    project: Project,
    *,
    layers: Sequence[str] = (),
    samples: int | None = None,
    write: bool = False,
    quick: bool = False,
    dry_run: bool = False,
    report: Report | None = None,
) -> dict[str, Any]:
    """Try layers and settings on held-out samples; the run directory stays as it is.

    Args:
        layers: parameter names, by default every candidate.
        samples: held-out samples to look at, by default 400.
        write: put what to start with into the settings file, where there is something to recommend.
        quick: without the small run.
        dry_run: only say what would be tried.

    Returns:
        of a dry run {"what"}; else what `Probe.run` finds, and {"written": the settings file or None, "unchanged": the file
        where there was nothing to write, or None, "next": the command to type, or ""}.

    Raises:
        OcdError: the base is not there, a layer does not exist, faults of the task, a settings file that cannot be written.
    """
    check_run(project)
    if write:
        # Before the work rather than after it.
        require_writable(project.config_path)
    context = RunContext(project)
    require_done(States(project, context.hash_dataset), ("train-base",), "probing")
    with threads_restored():
        if project.settings.run.threads != AUTO:
            set_threads(project.settings.run.threads)
        probing = Probe(context, layers, samples or SAMPLES, report or Silent())
        if dry_run:
            return {"what": probing.plan(write=write, quick=quick)}
        found = probing.run(quick=quick)
    return found | _recommended(project, found["start_with"], write)


def _reason(error: Exception) -> str:
    """The first line of what is wrong."""
    return (getattr(error, "message", "") or f"{type(error).__name__}: {error}").splitlines()[0]


def _recommended(project: Project, best: dict[str, Any], write: bool) -> dict[str, Any]:
    """What to start with, and what else of `[collect]` flags gave the trials; where it is written; and what to type next."""
    if not best:
        return {"written": None, "unchanged": str(project.config_path) if write else None, "next": ""}
    given = dict(map(parse_override, project.overrides))
    start = best | {name: value for name, value in given.items() if name.startswith("collect.") and name not in best}
    if write:
        write_settings(project.config_path, start)
    # What was given for this command alone, later ones need as well.
    others = [
        text for text in project.overrides if not text.startswith(("task.", "run.")) and parse_override(text)[0] not in start
    ]
    flags = project.flags + set_flags(others) + ("" if write else as_flags(start))
    written = str(project.config_path) if write else None
    return {"start_with": start, "written": written, "unchanged": None, "next": f"ocd run{flags}"}


class Probe:
    """One call of `probe`."""

    def __init__(self, context: RunContext, layers: Sequence[str], samples: int, report: Report) -> None:
        self._context, self._report = context, report
        base = context.base
        self._layers = [find_layer(base, name) for name in layers] or candidates(base)
        validation = context.splits["validation"]
        check_task(context.task, base, validation)
        if len(validation) < FEWEST_SAMPLES:
            raise DataError(
                f"there are {len(validation)} validation samples, too few to tell anything from: at least {FEWEST_SAMPLES} "
                "are needed",
                "give more" if context.validation_is_given else "hold a larger part of train out with task.validation_fraction",
            )
        self._evaluated = EvaluatedSamples(validation, seeded_order(len(validation), context.seed, "probe", samples))
        self._trials = Trials(context, self._evaluated)
        self._began = time.monotonic()
        self._sizes: dict[str, AtOnce] = {}

    def plan(self, *, write: bool, quick: bool) -> str:
        names = ", ".join(layer.name for layer in self._layers)
        settings, small = ", ".join(map(settings_text, self._grid())), "" if quick else ", then a small run"
        what = f"try {settings} on {names}, with {len(self._evaluated.order):,} held-out samples{small}; nothing is written"
        return what + (f" but what to start with, into {self._context.project.config_path}" if write else "")

    def run(self, *, quick: bool) -> dict[str, Any]:
        """Try everything, choose by one half of the samples, look at the other.

        Returns:
            {"verdict", "headroom": "none" | "labels" | "x" | "unknown", "start_with": {setting: value}, "warnings": [text],
            "chosen": {"neighbours" | "mean delta" | "labels": {"mean", "difference", "interval", "favoured": by each half of
            the samples}}, "small_run": what `small_run` finds, and {"start": the layer and settings}, or None, "metric",
            "samples", "searched", "strengths": those tried, "tried": [{"layer", "settings", "rows", "strengths": {row: those of
            the halves}, "cost"}], "left_out": [{"name", "reason"}]}.
        """
        tried, left_out = self._try_all()
        trials = [trial for trial, _ in tried]
        seen, base = self._context.validation_is_seen, self._context.manifest_of("train-base").summary
        found = headroom(trials, choose(trials, RESAMPLES, self._trials.rng()), more=self._more(), seen=seen)
        # Where there is no finding either way, it would be none.
        without = quick or seen or base.get("worse_than_constant")
        found |= {"small_run": None} if without else self._small_run(found, tried, left_out)
        if base.get("worse_than_constant"):
            # Whatever lowers such a loss gains.
            found |= {
                "verdict": f"mend the base first, which is worse than a constant; as it is, {found['verdict']}",
                "start_with": {},
            }
        about_base = [f"train-base: {text}" for text in base.get("warnings", []) if PROBABLY_SEEN not in text]
        return {
            **found,
            "warnings": [*about_base, *([f"{PROBABLY_SEEN}; {GIVE_VALIDATION}"] if seen else [])],
            "metric": trials[0].metric,
            "samples": len(self._evaluated.order),
            "searched": len(self._trials.searched),
            "strengths": list(STRENGTHS),
            "tried": [record for _, record in tried],
            "left_out": left_out,
        }

    def _small_run(
        self, found: dict[str, Any], tried: Sequence[tuple[Trial, dict[str, Any]]], left_out: list[dict[str, str]]
    ) -> dict[str, Any]:
        """What a small run gives with the recommended settings, or with those of the surest gain; and what to start with: where
        it gains, also as it was trained."""
        starts = {id(trial): start_of(trial) for trial, _ in tried}
        start = found["start_with"] or starts[id(choice_of([trial for trial, _ in tried], CHOSEN[NEIGHBOURS]).trial)]
        cost = next(record["cost"] for trial, record in tried if starts[id(trial)] == start)
        self._report.message(f"a small run with {start['select-layer.layer']}")
        try:
            small = small_run(self._context, start, self._evaluated, cost)
        except (OcdError, RuntimeError) as error:
            left_out.append({"name": "a small run", "reason": _reason(error)})
            return {"small_run": None}
        learned = small.pop("settings")
        start_with = start | learned if learned else found["start_with"]
        return {"small_run": small | {"start": start}, "start_with": start_with}

    def _try_all(self) -> tuple[list[tuple[Trial, dict[str, Any]]], list[dict[str, str]]]:
        """Settings in the order of the grid, each with every layer, until the time is over; and what is left out, with the
        reason."""
        tried, left_out, refused = [], [], set()
        combinations = [(settings, layer) for settings in self._grid() for layer in self._layers]
        for number, (settings, layer) in enumerate(combinations):
            name = f"{layer.name}, {settings_text(settings)}"
            if layer.name in refused:
                continue
            if tried and time.monotonic() - self._began > BUDGET_S:
                left_out.append({"name": name, "reason": "the time was over; try it alone with --layer, or --set collect.…"})
                continue
            try:
                tried.append(self._at_once(layer).whole(functools.partial(self._trials.attempt, layer, settings)))
            except (OcdError, RuntimeError) as error:
                # Whatever it is that torch or this layer cannot do: another one may do.
                refused.add(layer.name)
                left_out.append({"name": layer.name, "reason": _reason(error)})
            self._report.progress(number + 1, len(combinations), "layers × settings")
        if not tried:
            raise OcdError(f"no layer can be tried: {left_out[0]['reason']}", "name another with --layer")
        return tried, left_out

    def _more(self) -> str:
        """How to get more samples."""
        count, most = len(self._evaluated.order), len(self._evaluated.split)
        if count < most:
            return f"look at more with --samples {min(most, 4 * count)}"
        if self._context.validation_is_given:
            return "give more samples with task.validation, or in the Task's validation()"
        return (
            "give samples with task.validation, or hold more of train out with a larger task.validation_fraction, which leaves "
            "fewer to train the base on"
        )

    def _grid(self) -> list[dict[str, Any]]:
        """The settings of `[collect]` first."""
        table = self._context.project.settings.collect
        mine = {key: getattr(table, key) for key in ("optimizer", "lr", "steps")}
        plain = {key: value for key, value in PLAIN.items() if getattr(table, key) != value}
        return [mine, *(settings | plain for settings in GRID if plain or settings != mine)]

    def _at_once(self, layer: Layer) -> AtOnce:
        """Samples of a batch: half as many where memory runs out, and the trial begins anew."""
        if layer.name not in self._sizes:
            device, room, most = self._context.device, BATCH_BYTES, LARGEST_BATCH
            if device.type == "cuda":
                room, most = int(GPU_SHARE * free_on_gpu(device)), LARGEST_ON_GPU
            size, say = min(most, room // (4 * 5 * layer.numel)), self._report.message
            self._sizes[layer.name] = AtOnce(size, tell=lambda left: say(f"memory ran out: {left} samples at once"))
        return self._sizes[layer.name]
