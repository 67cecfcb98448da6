"""infer: sample deltas from the inputs alone, apply them, predict (Alg. 2); and the door for Python programs, `open_run`."""

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from stages.evaluation.pictures import check_pictures, write_pictures
from stages.foundation.errors import SettingsError
from stages.foundation.files import digest, remove, require_space, sha256_file, sweep
from stages.foundation.progress import Report
from stages.foundation.trees import Tree, leaves, to_device
from stages.lifecycle.materials import Materials
from stages.lifecycle.outcome import Finished, Outcome
from stages.lifecycle.sharing import SharedStage
from stages.prediction.batch_size import prediction_batch, prediction_bytes
from stages.prediction.personalised import PersonalisedModel
from stages.prediction.predicting import Answering, Smaller, extract_members
from stages.prediction.predictor import load_personalised, strength_of
from stages.run_directory.folders import StageFolder, check_run, folder_of
from stages.run_directory.locks import Part
from stages.run_directory.pipeline import AUTO, spec_of
from stages.run_directory.project import Project, load_project
from stages.run_directory.states import States, require_done
from stages.store.delta_store import STORE, ArraySpec
from stages.store.ledger import LEDGER
from stages.store.predictions import Answer, answer_rows
from stages.tasks.data import Split, check_like, load_npz
from stages.tasks.loader import check_task

PREDICTIONS, SMALLER = "predictions.npz", "smaller"
SPLITS = ("test", "validation", "train")
SMALLER_BLOCKS = "smaller batches, of which blocks are made, with --set infer.batch_size=N"


def infer(
    project: Project,
    *,
    split: str = "test",
    input_file: Path | None = None,
    part: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    report: Report | None = None,
) -> Outcome:
    """Predict for a split of the task, or for the x of a file. Asking again with other settings redoes that one answer.

    Args:
        part: "i/n", the i-th of n parts of the blocks; the last part to finish makes the answer whole.

    Raises:
        OcdError: as `Stage.execute`; inputs that are missing, damaged or unlike the training set's.
    """
    return Infer(project, report, split=split, input_file=input_file, part=part).execute(force=force, dry_run=dry_run)


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


class Infer(SharedStage):
    """The stage, for one query.

    Args:
        project: the project.
        report: hears of its progress.
        split: test, validation or train.
        input_file: an npz file with x, or an npy file of x, in place of a split.
        part: as `infer`.
    """

    name = "infer"
    redoes_stale = True
    scratch = (LEDGER, SMALLER)

    def __init__(
        self,
        project: Project,
        report: Report | None = None,
        *,
        split: str = "test",
        input_file: Path | None = None,
        part: str | None = None,
    ) -> None:
        super().__init__(project, report, part=part)
        if split not in SPLITS:
            raise SettingsError(f"--split {split}: expected one of {', '.join(SPLITS)}", "or name a file with --input")
        self._split, self._input_file = split, input_file
        # Looked at at once: a file with faults is refused before anything else happens.
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
        return self._content_inputs

    @cached_property
    def _content_inputs(self) -> dict[str, Any]:
        if self._split == "test" and self._input_file is None:
            return {"query": self._split}
        if self._input_file is None:
            return {"query": f"{self._split} {digest(self.splits[self._split].rows.tolist())}"}
        return {"query": sha256_file(self._input_file)}

    def resolved(self) -> dict[str, Any]:
        """What `auto` stands for."""
        return {"infer.strength": strength_of(self)}

    def plan(self) -> dict[str, Any]:
        """Inputs, members and bytes: the blocks stay until what is put together of them is whole."""
        count, members = len(self._inputs), self.settings.ensemble
        if self._part:
            self._check_part()
        size = count * (2 * self._row_bytes + (self._delta.row_bytes if self._delta else 0))
        return {"what": f"{count:,} inputs × {members} members, {self.settings.sample_steps} steps each", "bytes": size}

    def check(self) -> None:
        """The inputs are like the training set's, labels (where there are some) in range, the first one can be drawn, the
        networks load, and there are blocks enough for the parts."""
        check_like(self._inputs.inputs([0]), self.splits["all"].inputs([0]), self._inputs.name)
        if self._inputs.labels([0]) is not None:
            check_task(self.task, self.base, self._inputs)
        if self.settings.pictures:
            check_pictures(self.task, self._inputs, self._like)
        self.personalised  # noqa: B018 (made here, so that what is wrong with it is found before anything is written)
        self._check_part()

    def extend(self, finished: Path, wip: Path) -> None:
        """Keep the members of a smaller ensemble until the larger one is written."""
        record = self.folder.manifest()["files"].get(PREDICTIONS, {})
        if sha256_file(finished / PREDICTIONS) == record.get("sha256"):
            extract_members(finished / PREDICTIONS, wip / SMALLER)

    def prepare(self, wip: Path) -> None:
        """Settle what all parts share, and lay out the ledger."""
        members = self.settings.ensemble
        if self._begun["execution"].get("members", members) != members:
            # Begun for fewer: blocks of those do not count, nor does the batch that suited them.
            self._begun["execution"] = {}
            for name in (LEDGER, STORE):
                remove(wip / name)
        batch = self._batch_size()
        self.keep_execution(batch_size=batch, block_samples=self._block_rows(batch), members=members)
        answer = self._answer(wip)
        Part.check(self._part, answer.blocks, SMALLER_BLOCKS)
        self.tell_total(answer.blocks, "blocks")
        if self._part is None:
            sweep(wip)
        count, delta = len(self._inputs), self._delta.row_bytes if self._delta else 0
        left = (answer.blocks - answer.records) / answer.blocks
        require_space(wip, round(count * (self._row_bytes + left * (self._row_bytes + delta))))
        answer.create()
        if self._part is None:
            answer.trim()
        self.divide(answer)

    def work(self, wip: Path) -> Finished | None:
        """Every block (of the part) that is not done, then what makes the answer whole; None while others have some to do."""
        answer = self._answer(wip)
        before = self.look_again(answer, "inputs")
        left = sum(len(answer.block_range(block)) for block in self._pending)
        if reason := self._personalised[1]:
            self.report.message(reason)
        ensemble, like = self.settings.ensemble, self._like
        # Those of a smaller ensemble come without their deltas; where nothing is left to do, the folder may be gone.
        smaller = Smaller(wip / SMALLER if self._pending and not self._delta else None, like, len(self._inputs))
        answering = Answering(self.personalised, self._inputs, ensemble, like, smaller)
        answering.work(
            answer,
            self._pending,
            self._begun["execution"]["batch_size"],
            lambda done: self.report.progress(before + done, before + left, "inputs"),
        )
        return self._finished(answer, answering) if self.is_whole(answer) else None

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

    @cached_property
    def _like(self) -> Tree:
        """An output, (1, …)."""
        with torch.no_grad():
            return to_device(self.forward(self.base, to_device(self._inputs.inputs([0]), self.device)), torch.device("cpu"))

    @property
    def _row_bytes(self) -> int:
        """Of an input's predictions: base, ensemble and members, its ρ and number."""
        return (self.settings.ensemble + 2) * sum(
            leaf.numel() * leaf.element_size() for leaf in leaves(self._like).values()
        ) + 12

    @property
    def _delta(self) -> ArraySpec | None:
        """An input's sampled deltas, where they are kept."""
        return ArraySpec("float32", (self.settings.ensemble, *self.layer.matrix_shape)) if self.settings.save_deltas else None

    def _batch_size(self) -> int:
        wanted, count = self.settings.batch_size, len(self._inputs)
        if wanted == AUTO:
            sample = prediction_bytes(self.personalised.runner, to_device(self._inputs.inputs([0]), self.device))
            wanted = prediction_batch(sample, self.layer.numel, self.settings.ensemble, self.device)
        return min(wanted, count)

    def _block_rows(self, batch: int) -> int:
        return answer_rows(len(self._inputs), batch, self._row_bytes)

    def _check_part(self) -> None:
        if self._part:
            rows = self._block_rows(self._batch_size())
            Part.check(self._part, -(-len(self._inputs) // rows), SMALLER_BLOCKS)

    def _answer(self, wip: Path) -> Answer:
        kept, members = self._begun["execution"], self.settings.ensemble
        rows, batch = kept["block_samples"], kept["batch_size"]
        return Answer(wip, len(self._inputs), rows, self.fingerprint, members, self._delta, batch)

    def _finished(self, answer: Answer, answering: Answering) -> Finished:
        path = answer.folder / PREDICTIONS
        answer.put_together(path)
        content, figures = sha256_file(path), answering.figures(answer, self.task)
        summary = {
            "query": query_name(self._split, self._input_file),
            "inputs": len(self._inputs),
            "ensemble": self.settings.ensemble,
            "strength": strength_of(self),
            **figures,
            "predictions": PREDICTIONS,
            **write_pictures(self, self._inputs, answer, self._like, self.settings.pictures, self.report),
        }
        reached = {"value": self.settings.ensemble, "reached": self.settings.ensemble, "exhausted": False}
        return Finished(summary, digest(content), {"infer.ensemble": reached}, hashes={PREDICTIONS: content})
