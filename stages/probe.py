"""probe: before anything costly, is there something to gain? Tries layers and settings on a few held-out samples."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stages.diffusion.denoisers import auto_preset, make_denoiser, resolve
from stages.evaluation import rows as row
from stages.evaluation.comparison import cross_fitted, seeded_order
from stages.evaluation.from_run import LAYER_INPUT, OverfittedOnDemand, make_subject, probe_of
from stages.evaluation.headroom import Trial, headroom
from stages.evaluation.neighbours import Neighbours, input_blocks, nearest, places_of
from stages.evaluation.results import estimate_all, row_records
from stages.evaluation.rows import Row
from stages.evaluation.subject import Batch, EvaluatedSamples, Subject
from stages.evaluation.verdict import NEIGHBOURS as NEIGHBOUR_ROWS
from stages.foundation.errors import DataError, OcdError
from stages.foundation.progress import Report, Silent
from stages.foundation.seeds import seed_of
from stages.foundation.threads import set_threads, threads_restored
from stages.foundation.torch_state import usual_torch
from stages.foundation.trees import to_device
from stages.lifecycle.context import RunContext
from stages.per_sample.layer import Layer, candidates, find_layer
from stages.run_directory.folders import check_run
from stages.run_directory.pipeline import AUTO
from stages.run_directory.project import Project
from stages.run_directory.states import States, require_done
from stages.store.delta_store import result_specs
from stages.tasks.checks import check_task
from stages.tasks.conditioning import check_condition
from stages.tasks.data import Split
from stages.training.memory import operations

# What is tried beside the settings of `[collect]`.
GRID: tuple[dict[str, Any], ...] = (
    {"optimizer": "adam", "lr": 5e-4, "steps": 3},
    {"optimizer": "sgd", "lr": 5e-3, "steps": 3},
    {"optimizer": "adam", "lr": 2e-3, "steps": 3},
    {"optimizer": "sgd", "lr": 5e-2, "steps": 3},
)
# What the grid's settings are without, whatever `[collect]` has.
PLAIN: dict[str, Any] = {"momentum": 0.0, "weight_decay": 0.0, "until_converged": False}
SAMPLES, FEWEST, BUDGET_S = 400, 5, 60.0
# Training samples that neighbours are looked for among: as many as the base sees in so many seconds.
SEARCH_S, MOST_SEARCHED, FEWEST_SEARCHED = 2.0, 20_000, 256
NEIGHBOURS, STRENGTHS = 5, (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
RESAMPLES = 1000
BATCH_BYTES, LARGEST_BATCH = 128 << 20, 64
# Chunks compress to about two thirds at best; what is said is what they take uncompressed.
FLOAT_BYTES = 4
# A step of more multiplications takes too long to try.
MOST_OPERATIONS = 1 << 36


@usual_torch()
def probe(
    project: Project,
    *,
    layers: Sequence[str] = (),
    samples: int | None = None,
    dry_run: bool = False,
    report: Report | None = None,
) -> dict[str, Any]:
    """Try layers and settings on held-out samples; nothing is written.

    Args:
        project: only its base has to be there.
        layers: parameter names, by default every candidate.
        samples: held-out samples to look at, by default 400.
        dry_run: only say what would be tried.

    Returns:
        of a dry run {"what"}; else
        {"verdict", "headroom": "none" | "labels" | "x", "start_with": {setting: value}, "metric", "samples", "searched",
        "tried": [{"layer", "settings", "rows", "strengths", "cost"}], "left_out": [{"name", "reason"}]}.

    Raises:
        OcdError: the base is not there, a layer does not exist, faults of the task.
    """
    check_run(project)
    context = RunContext(project)
    require_done(States(project, context.hash_dataset), ("train-base",), "probing")
    with threads_restored():
        if project.settings.run.threads != AUTO:
            set_threads(project.settings.run.threads)
        found = Probe(context, layers, samples or SAMPLES, report or Silent())
        return {"what": found.plan()} if dry_run else found.run()


class Probe:
    """One call of `probe`."""

    def __init__(self, context: RunContext, layers: Sequence[str], samples: int, report: Report) -> None:
        self._context, self._report = context, report
        base = context.base
        self._layers = [find_layer(base, name) for name in layers] or candidates(base)
        validation = context.splits["validation"]
        check_task(context.task, base, validation)
        if len(validation) < FEWEST:
            raise DataError(
                f"there are {len(validation)} validation samples, too few to tell anything from: {FEWEST} are needed at least",
                "give more" if context.validation_is_given else "hold a larger part of train out with task.validation_fraction",
            )
        self._evaluated = EvaluatedSamples(validation, seeded_order(len(validation), context.seed, "probe", samples))
        self._searched = self._rows_to_search()
        self._began = time.monotonic()
        self._in_x: Neighbours | None = None
        self._seen: dict[str, Neighbours] = {}

    def plan(self) -> str:
        names = ", ".join(layer.name for layer in self._layers)
        settings = ", ".join(map(_text, self._grid()))
        return f"try {settings} on {names}, with {len(self._evaluated.order):,} held-out samples; nothing is written"

    def run(self) -> dict[str, Any]:
        """Settings in the order of the grid, each with every layer, until the time is over."""
        tried, left_out, refused = [], [], set()
        combinations = [(settings, layer) for settings in self._grid() for layer in self._layers]
        for number, (settings, layer) in enumerate(combinations):
            name = f"{layer.name}, {_text(settings)}"
            if layer.name in refused:
                continue
            if tried and time.monotonic() - self._began > BUDGET_S:
                left_out.append({"name": name, "reason": "the time was over; try it alone with --layer, or --set collect.…"})
                continue
            try:
                tried.append(self._try(layer, settings))
            except (OcdError, RuntimeError) as error:
                # Whatever it is that torch or this layer cannot do: another one may do.
                refused.add(layer.name)
                message = getattr(error, "message", "") or f"{type(error).__name__}: {error}"
                left_out.append({"name": layer.name, "reason": message.splitlines()[0]})
            self._report.progress(number + 1, len(combinations), "layers × settings")
        if not tried:
            raise OcdError(f"no layer can be tried: {left_out[0]['reason']}", "name another with --layer")
        found = headroom([trial for trial, _ in tried])
        return {
            **found,
            "metric": tried[0][0].metric,
            "samples": len(self._evaluated.order),
            "searched": len(self._searched),
            "tried": [record for _, record in tried],
            "left_out": left_out,
        }

    def _grid(self) -> list[dict[str, Any]]:
        """The settings of `[collect]` first."""
        table = self._context.project.settings.collect
        mine = {key: getattr(table, key) for key in ("optimizer", "lr", "steps")}
        plain = {key: value for key, value in PLAIN.items() if getattr(table, key) != value}
        return [mine, *(settings | plain for settings in GRID if plain or settings != mine)]

    def _rows_to_search(self) -> Tensor:
        train, context = self._context.splits["train"], self._context
        few = train.inputs(range(min(32, len(train))))
        start = time.perf_counter()
        with torch.no_grad():
            context.forward(context.base, to_device(few, context.device))
        context.wait()
        each = (time.perf_counter() - start) / min(32, len(train))
        count = max(FEWEST_SEARCHED, min(MOST_SEARCHED, int(SEARCH_S / max(each, 1e-9))))
        return seeded_order(len(train), context.seed, "probe searched", count)

    def _try(self, layer: Layer, settings: dict[str, Any]) -> tuple[Trial, dict[str, Any]]:
        """One layer with one recipe: every row on the held-out samples, and what a full run would cost."""
        subject = make_subject(self._context, layer, **settings)
        check_condition(subject.task, subject.base, layer, to_device(probe_of(self._context)[0], subject.device))
        subject = dataclasses.replace(
            subject, training=OverfittedOnDemand(subject, self._context.splits["train"], self._searched)
        )
        evaluated = EvaluatedSamples(self._evaluated.split, self._evaluated.order, self._neighbours(subject))
        size = max(1, min(LARGEST_BATCH, BATCH_BYTES // (4 * 5 * layer.numel)))
        start = time.perf_counter()
        mean = self._mean_delta(subject, size)
        each = (time.perf_counter() - start) / min(len(self._evaluated.order), len(self._searched))
        gathered, strengths = cross_fitted(subject, evaluated, self._rows(mean, evaluated), STRENGTHS, size)
        rng = np.random.default_rng(seed_of(self._context.seed, "probe"))
        found, metric = estimate_all(gathered, RESAMPLES, rng, lambda done: None)
        trial = Trial(layer.name, settings, metric, {name: metrics[metric] for name, metrics in found.items()})
        record = {
            "layer": layer.name,
            "settings": settings,
            "rows": row_records(gathered, found),
            "strengths": strengths,
            "cost": self._cost(subject, each),
        }
        return trial, record

    def _neighbours(self, subject: Subject) -> dict[str, Neighbours]:
        """In x, found once, and in what the layer sees, found once a layer."""
        train, searched, evaluated = self._context.splits["train"], self._searched, self._evaluated
        order, count = evaluated.order, len(evaluated.split)
        if self._in_x is None and (queries := places_of(subject.task, evaluated.split.inputs(order))) is not None:
            found = nearest(queries.to(subject.device), input_blocks(subject.task, train, searched, subject.device), NEIGHBOURS)
            self._in_x = found.spread(order, count)
        name = subject.layer.name
        if name not in self._seen:
            queries = self._layer_inputs(subject, evaluated.split, order)
            seen = enumerate(self._layer_inputs(subject, train, searched))
            blocks = ((number * LARGEST_BATCH, part) for number, part in seen)
            found = nearest(torch.cat(list(queries)), blocks, NEIGHBOURS)
            self._seen[name] = found.spread(order, count)
        return {row.IN_LAYER_INPUT: self._seen[name]} | ({} if self._in_x is None else {row.IN_X: self._in_x})

    @torch.no_grad()
    def _layer_inputs(self, subject: Subject, split: Split, positions: Tensor) -> Iterator[Tensor]:
        """What the layer sees of some samples, part by part, (n, d); as the store would have it."""
        for part in positions.split(LARGEST_BATCH):
            batch = Batch(subject, EvaluatedSamples(split, positions), part)
            fields = batch.fields
            seen = fields.get(LAYER_INPUT)
            yield (subject.overfitter.first_pass(batch.x).captured[LAYER_INPUT].float() if seen is None else seen).flatten(1)

    def _mean_delta(self, subject: Subject, size: int) -> Tensor:
        """Of as many training samples as there are held-out ones, (out, in)."""
        train, positions = self._context.splits["train"], self._searched[: len(self._evaluated.order)]
        total, count = torch.zeros(subject.layer.matrix_shape, device=subject.device), 0
        for part in positions.split(size):
            deltas, degenerate = subject.overfit(train, part, train.batch(part))
            self._context.wait()
            total += deltas[~degenerate].sum(0)
            count += int((~degenerate).sum())
        return total / max(1, count)

    def _rows(self, mean: Tensor, evaluated: EvaluatedSamples) -> list[Row]:
        missing = {kind: "" for kind in (row.IN_X, row.IN_LAYER_INPUT) if kind not in evaluated.neighbours}
        return [
            *row.base_and_oracle(),
            *row.neighbour_rows(missing, validated=NEIGHBOUR_ROWS),
            row.random_direction_row(lambda batch: batch.overfitted.flatten(1).norm(dim=1)),
            row.mean_row(mean),
        ]

    def _cost(self, subject: Subject, each: float) -> dict[str, Any]:
        """What a full run would take: seconds of collecting and (at most) of training the denoiser, bytes of the store."""
        settings, layer = self._context.project.settings, subject.layer
        samples = len(self._context.splits[settings.collect.split])
        if settings.collect.samples != "all":
            samples = min(samples, settings.collect.samples)
        few = Batch(subject, self._evaluated, self._evaluated.order[:1])
        specs = result_specs(layer.matrix_shape)
        fields = {name: value[0].numel() for name, value in few.fields.items()}
        size = samples * (sum(spec.row_bytes for spec in specs.values()) + FLOAT_BYTES * sum(fields.values()))
        step = self._training_step(layer, fields, samples)
        return {
            "samples": samples,
            "collect_seconds": each * samples,
            "collect_bytes": size,
            "train_diffusion_seconds": None if step is None else step * settings.train_diffusion.max_steps,
        }

    def _training_step(self, layer: Layer, fields: dict[str, int], samples: int) -> float | None:
        """Seconds of one step of the denoiser's training; None where it is too large to try."""
        table = self._context.project.settings.train_diffusion
        auto = {"preset": auto_preset(layer.matrix_shape, samples)} if table.preset == AUTO else {}
        description = resolve(table.model_dump() | auto, layer.matrix_shape)
        description |= {"shape": layer.matrix_shape, "fields": fields}
        with torch.device("meta"):
            if operations(make_denoiser(description)) * description["batch_size"] > MOST_OPERATIONS:
                return None
        device, batch = self._context.device, description["batch_size"]
        denoiser = make_denoiser(description).to(device)
        given = {name: torch.zeros(batch, count, device=device) for name, count in fields.items()}
        noisy, t = torch.zeros(batch, *layer.matrix_shape, device=device), torch.zeros(batch, dtype=torch.long, device=device)
        for _ in range(2):
            start = time.perf_counter()
            denoiser(noisy, t, denoiser.encode(given)).square().mean().backward()
            self._context.wait()
        return time.perf_counter() - start


def _text(settings: dict[str, Any]) -> str:
    return f"{settings['optimizer']} {settings['lr']:g} × {settings['steps']}"
