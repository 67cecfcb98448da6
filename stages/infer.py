"""infer: sample deltas from the inputs alone, apply them, predict (Alg. 2); and the door for Python programs, `open_run`."""

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from torch import Tensor

from stages.artifacts.delta_store import ArraySpec, create_array
from stages.artifacts.files import digest, link_or_copy, remove, require_space, sha256_file
from stages.artifacts.pipeline import spec_of
from stages.artifacts.progress import Report
from stages.artifacts.project import Project, load_project
from stages.artifacts.run_directory import StageFolder, check_run, folder_of
from stages.artifacts.states import States, require_done
from stages.artifacts.tensors import save_arrays
from stages.errors import SettingsError
from stages.materials import Materials
from stages.outcome import Finished, Outcome
from stages.predictor import load_personalised, strength_of
from stages.stage import Stage
from stages.tasks.data import Split, check_like, load_npz
from stages.tasks.loader import check_task, naming_rows
from stages.tasks.scoring import EVALUATION_BATCH, finite, metrics_of
from stages.trees import Tree, concatenate, leaves, take, to_device, tree_map
from stages.weights.personalised import PersonalisedModel, Prediction

PREDICTIONS, DELTAS, SMALLER = "predictions.npz", "deltas.zarr", "smaller.npz"
SPLITS = ("test", "validation", "train")
BATCH_BYTES = 64 << 20


def infer(
    project: Project,
    *,
    split: str = "test",
    input_file: Path | None = None,
    force: bool = False,
    dry_run: bool = False,
    report: Report | None = None,
) -> Outcome:
    """Predict for a split of the task, or for the x of an npz file. Asking again with other settings redoes that one answer.

    Raises:
        OcdError: as `Stage.execute`; inputs that are missing, damaged or unlike the training set's.
    """
    return Infer(project, report, split=split, input_file=input_file).execute(force=force, dry_run=dry_run)


def open_run(
    config: Path | str | None = None,
    *,
    run: Path | str | None = None,
    overrides: Sequence[str] = (),
    values: Mapping[str, Any] | None = None,
) -> PersonalisedModel:
    """Open a finished run for predicting from Python: `open_run("ocd.toml").predict(x, ensemble=5).output`.

    Args:
        config: `ocd.toml` or its folder; by default found from the working directory upward.
        run: another run directory.
        overrides: "table.key=value" texts, as `--set` takes them.
        values: "table.key" to value.

    Raises:
        OcdError: settings with faults, stages that are not done, damaged artifacts.
    """
    project = load_project(config, run=run, overrides=overrides, values=values)
    check_run(project)
    materials = Materials(project)
    require_done(States(project, materials.hash_dataset), spec_of(project, "infer").reads, "predicting")
    return load_personalised(materials)[0]


def query_name(split: str, input_file: Path | None) -> str:
    """The name of an answer's folder: the split, or the stem of the input file, told apart from the splits."""
    if input_file is None:
        return split
    stem = re.sub(r"[^\w-]+", "-", input_file.stem).strip("-") or "input"
    return f"input-{stem}" if stem in SPLITS else stem


class Infer(Stage):
    """The stage, for one query.

    Args:
        project: the project.
        report: hears of its progress.
        split: test, validation or train.
        input_file: an npz file with x, in place of a split.
    """

    name = "infer"
    redoes_stale = True

    def __init__(
        self, project: Project, report: Report | None = None, *, split: str = "test", input_file: Path | None = None
    ) -> None:
        super().__init__(project, report)
        if split not in SPLITS:
            raise SettingsError(f"--split {split}: expected one of {', '.join(SPLITS)}", "or name a file with --input")
        self._split, self._input_file = split, input_file
        # Read at once: a file with faults is refused before anything else happens.
        self._given = Split(load_npz(input_file, labels=False), name=input_file.name) if input_file else None

    @property
    def folder(self) -> StageFolder:
        """`infer/<name>`."""
        return folder_of(self.project, self.name, query_name(self._split, self._input_file))

    @property
    def splits_read(self) -> dict[str, str]:
        """The split whose content counts; a part of train has that of train."""
        has_file = self._split != "validation" or self.validation_is_given
        return {"input": "" if self._input_file else self._split if has_file else "train"}

    def content_inputs(self) -> dict[str, Any]:
        """The input file's hash, or the split's name."""
        if self._split == "test" and self._input_file is None:
            return {"query": self._split}
        if self._input_file is None:
            return {"query": f"{self._split} {digest(self.splits[self._split].rows.tolist())}"}
        return {"query": sha256_file(self._input_file)}

    def resolved(self) -> dict[str, Any]:
        """What `auto` stands for."""
        return {"infer.strength": strength_of(self)}

    def plan(self) -> dict[str, Any]:
        """Inputs, members and bytes."""
        count, members = len(self._inputs), self.settings.ensemble
        size = count * (members + 2) * self._output_bytes()
        if self.settings.save_deltas:
            size += count * members * 4 * self.layer.numel
        return {"what": f"{count:,} inputs × {members} members, {self.settings.sample_steps} steps each", "bytes": size}

    def check(self) -> None:
        """The inputs are like the training set's, labels (where there are some) in range, and the networks load."""
        check_like(self._inputs.inputs([0]), self.splits["all"].inputs([0]), self._inputs.name)
        if self._inputs.labels([0]) is not None:
            check_task(self.task, self.base, self._inputs)
        self.personalised  # noqa: B018 (made here, so that what is wrong with it is found before anything is written)

    def extend(self, finished: Path, wip: Path) -> None:
        """Keep the members of a smaller ensemble until the larger one is written."""
        link_or_copy(finished / PREDICTIONS, wip / SMALLER)

    def work(self, wip: Path) -> Finished:
        """Predict batch by batch, then write all at once."""
        settings, inputs = self.settings, self._inputs
        batch = self.keep_execution(batch_size=self._batch_size())["batch_size"]
        require_space(wip, self.plan()["bytes"])
        known = self._known_members()
        first = 0 if known is None else len(next(iter(leaves(known).values())))
        deltas = self._delta_array(wip, len(inputs), batch) if settings.save_deltas else None
        self.tell_total(len(inputs), "inputs")
        if reason := self._personalised[1]:
            self.report.message(reason)
        parts: list[Prediction] = []
        for start in range(0, len(inputs), batch):
            span = range(start, min(len(inputs), start + batch))
            found = self.personalised.predict(
                inputs.inputs(span), settings.ensemble - first, rows=list(span), first_member=first
            )
            if deltas is not None:
                deltas[span.start : span.stop] = found.deltas.cpu().numpy()
            parts.append(_to_cpu(found))
            self.report.progress(span.stop, len(inputs), "inputs")
        members = concatenate([tree_map(lambda leaf: leaf.transpose(0, 1), part.members) for part in parts])
        members = tree_map(lambda leaf: leaf.transpose(0, 1), members)
        if known is not None:
            members = tree_map(lambda old, new: torch.cat([old, new]), known, members)
        return self._finished(
            wip, members, concatenate([part.base_output for part in parts]), torch.cat([part.rho for part in parts])
        )

    @property
    def personalised(self) -> PersonalisedModel:
        """The base with input-dependent weights."""
        return self._personalised[0]

    @cached_property
    def _personalised(self) -> tuple[PersonalisedModel, str]:
        return load_personalised(self)

    @cached_property
    def _inputs(self) -> Split:
        if self._given is not None:
            return self._given
        return self.test_split if self._split == "test" else self.splits[self._split]

    def _batch_size(self) -> int:
        if self.settings.batch_size != "auto":
            return self.settings.batch_size
        return max(1, min(1024, BATCH_BYTES // (4 * self.layer.numel * self.settings.ensemble)))

    def _output_bytes(self) -> int:
        with torch.no_grad():
            output = self.forward(self.base, to_device(self._inputs.inputs([0]), self.device))
        return sum(leaf.numel() * leaf.element_size() for leaf in leaves(output).values())

    def _known_members(self) -> Tree | None:
        """The members of a smaller ensemble that is this answer otherwise, (E, N, …), or None."""
        if not (self.folder.wip / SMALLER).exists() or self.settings.save_deltas:
            return None
        with np.load(self.folder.wip / SMALLER, allow_pickle=False) as archive:
            if "member_output" not in archive.files:
                return None
            return torch.from_numpy(archive["member_output"]).transpose(0, 1)

    def _delta_array(self, wip: Path, count: int, batch: int) -> Any:
        group = zarr.open_group(wip / DELTAS, mode="w", zarr_format=3)
        spec = ArraySpec("float32", (self.settings.ensemble, *self.layer.matrix_shape))
        return create_array(group, "delta", spec, count, min(batch, count))

    def _finished(self, wip: Path, members: Tree, base_output: Tree, rho: Tensor) -> Finished:
        output = self.personalised.combine(members)
        arrays: dict[str, Any] = {"rho": rho, "sample_index": self._inputs.rows}
        for name, tree in (("base_output", base_output), ("output", output)):
            arrays |= {f"{name}.{path}".rstrip("."): leaf for path, leaf in leaves(tree).items()}
        arrays |= {f"member_output.{path}".rstrip("."): leaf.transpose(0, 1) for path, leaf in leaves(members).items()}
        save_arrays(wip / PREDICTIONS, {name: value.contiguous().numpy() for name, value in arrays.items()})
        remove(wip / SMALLER)
        one = tree_map(lambda leaf: leaf[0], members)
        summary = {
            "query": query_name(self._split, self._input_file),
            "inputs": len(self._inputs),
            "ensemble": self.settings.ensemble,
            "strength": strength_of(self),
            "rho": float(rho.double().mean()),
            "metrics": self._metrics({"base": base_output, "ocd one draw": one, "ocd ensemble": output}),
            "predictions": PREDICTIONS,
        }
        reached = {"value": self.settings.ensemble, "reached": self.settings.ensemble, "exhausted": False}
        return Finished(summary, digest(sha256_file(wip / PREDICTIONS)), {"infer.ensemble": reached})

    def _metrics(self, outputs: dict[str, Tree]) -> dict[str, dict[str, float | None]] | None:
        """Means of the task's metrics for each output; None where there are no labels. Predictions are made
        before this reads them; beside it only `check` looks at labels, to refuse what could not be scored."""
        totals: dict[str, dict[str, float]] = {row: {} for row in outputs}
        count = len(self._inputs)
        for start in range(0, count, EVALUATION_BATCH):
            positions = range(start, min(count, start + EVALUATION_BATCH))
            y = self._inputs.labels(positions)
            if y is None:
                return None
            for row, output in outputs.items():
                with naming_rows(self._inputs, positions):
                    figures = metrics_of(self.task, take(output, slice(start, positions.stop)), y)
                for name, values in figures.items():
                    totals[row][name] = totals[row].get(name, 0.0) + float(values.double().sum())
        return {row: {name: finite(total / count) for name, total in figures.items()} for row, figures in totals.items()}


def _to_cpu(found: Prediction) -> Prediction:
    """Without the deltas, which would fill memory."""
    cpu = torch.device("cpu")
    return Prediction(
        to_device(found.output, cpu),
        to_device(found.members, cpu),
        to_device(found.base_output, cpu),
        found.rho.cpu(),
        torch.empty(0),
    )
