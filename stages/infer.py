"""infer: sample deltas from the inputs alone, apply them, predict (Alg. 2); and the Python entry point, `open_run`."""

import math
import re
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from stages.evaluation.from_run import samples_at_once
from stages.evaluation.pictures import check_pictures, write_pictures
from stages.evaluation.row_model import RowModel, chosen_row, make_row_model
from stages.foundation.errors import ArtifactError, SettingsError
from stages.foundation.files import digest, remove, require_space, sha256_file, sweep
from stages.foundation.progress import Report
from stages.foundation.trees import Tree, leaves, to_device
from stages.lifecycle.context import RunContext
from stages.lifecycle.results import CommandResult, WorkResult
from stages.lifecycle.sharing import BlockShare
from stages.lifecycle.stage import Stage
from stages.prediction.open_run import open_run
from stages.prediction.personalised import PersonalisedModel
from stages.prediction.predicting import (
    BASE,
    MEMBERS,
    OUTPUT,
    BlockPredictor,
    Smaller,
    extract_members,
    prediction_batch,
    prediction_bytes,
)
from stages.prediction.predictor import load_personalised, strength_of
from stages.run_directory.format import Extent
from stages.run_directory.locks import Part
from stages.run_directory.pipeline import AUTO, OWN_ROW, Query
from stages.run_directory.project import Project
from stages.store.delta_store import STORE, ArraySpec
from stages.store.ledger import LEDGER
from stages.store.predictions import PredictionBlocks, prediction_rows
from stages.tasks.checks import check_task
from stages.tasks.classes import logits_of
from stages.tasks.data import Split, check_like, load_npz
from stages.tasks.losses import CLASSIFICATION

__all__ = ["Infer", "infer", "open_run"]
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
) -> CommandResult:
    """Predict for a split of the task, or for the x of a file. Asking again with other settings redoes that one answer.

    Args:
        part: "i/n", the i-th of n parts of the blocks; the last part to finish makes the answer whole.

    Raises:
        OcdError: as `Stage.execute`; inputs that are missing, damaged or unlike the training set's.
    """
    stage = Infer(RunContext(project, report), part, split=split, input_file=input_file)
    return stage.execute(force=force, dry_run=dry_run)


class Infer(Stage):
    """Answers one query: about a split, or about the x of an npz or npy file."""

    name = "infer"
    scratch = (LEDGER, SMALLER)

    def __init__(
        self, context: RunContext, part: str | None = None, *, split: str = "test", input_file: Path | None = None
    ) -> None:
        super().__init__(context, part)
        if split not in SPLITS:
            raise SettingsError(f"--split {split}: expected one of {', '.join(SPLITS)}", "or name a file with --input")
        self._split, self._input_file = split, input_file
        # Looked at at once: a file with faults is refused before anything else happens.
        self._given = Split(load_npz(input_file, labels=False), name=input_file.name) if input_file else None

    @cached_property
    def query(self) -> Query:
        """The file, its stem told apart from the splits; or the split: a part of train has the content of train."""
        if self._input_file is not None:
            stem = re.sub(r"[^\w-]+", "-", self._input_file.stem).strip("-") or "input"
            return Query(f"input-{stem}" if stem in SPLITS else stem, "", sha256_file(self._input_file))
        split = self._split
        if split == "test":
            return Query(split, split, split)
        has_file = split != "validation" or self.context.validation_is_given
        content = f"{split} {digest(self.context.splits[split].rows.tolist())}"
        return Query(split, split if has_file else "train", content)

    def resolved(self) -> dict[str, Any]:
        return {"infer.strength": strength_of(self.context)} if self._row is None else {"infer.row": self._row}

    @cached_property
    def _row(self) -> str | None:
        """The row of `evaluate` that is asked for in place of OCD's own."""
        return None if self.settings.row == OWN_ROW else chosen_row(self.context)

    def in_the_way(self) -> ArtifactError | None:
        """An answer, whole or not, gives way to one about the same file, or of the same content, but not to one about another
        file that only has the same stem."""
        mine = self._path
        for record in (self.folder.begun(), self.folder.manifest()):
            known = record.execution.get("input") if record else None
            if mine and known not in (None, mine) and record.identity.inputs["query"] != self.query.content:
                return ArtifactError(
                    f"{self.folder.name} holds the predictions for {known}, and would hold those for {mine}: "
                    "they are named after the file, without its folder",
                    "rename one of the files to keep both, or replace the old ones: the same command with --force",
                )
        return None

    @property
    def _path(self) -> str | None:
        return str(self._input_file.resolve()) if self._input_file else None

    def plan(self) -> dict[str, Any]:
        """Inputs, members and bytes: the blocks stay until what is put together of them is whole."""
        count, members = len(self.inputs), self.settings.ensemble
        # A row may take a training before it predicts, which is no part of a plan.
        if self._row is None:
            self._check_part()
        size = count * (2 * self._row_bytes + (self._delta.row_bytes if self._delta else 0))
        return {"what": f"{count:,} inputs × {members} members, {self.settings.sample_steps} steps each", "bytes": size}

    def check(self) -> None:
        """The inputs are like the training set's, labels (where there are some) in range, the first one can be drawn, the
        networks load, and there are blocks enough for the parts."""
        context, inputs = self.context, self.inputs
        check_like(inputs.inputs([0]), context.splits["all"].inputs([0]), inputs.name)
        if inputs.labels([0]) is not None:
            check_task(context.task, context.base, inputs)
        if self.settings.pictures:
            check_pictures(context.task, inputs, self._like)
        if self.settings.save_deltas and self._row is not None:
            raise SettingsError(
                f"infer.save_deltas keeps the deltas that are sampled, and the row {self._row!r} is asked for",
                "leave one of them out: --save-deltas (infer.save_deltas), or --row (infer.row)",
            )
        self._predictor  # noqa: B018 (made here, so that what is wrong with it is found before anything is written)
        self._check_part()

    def begin(self, finished: Path | None) -> None:
        """Settle what all parts share, and lay out the ledger; the members of a smaller ensemble are kept until the larger one
        is written."""
        work, members = self.unfinished, self.settings.ensemble
        if finished is not None and self._row is None:
            record = self.folder.manifest().files.get(PREDICTIONS)
            if record and sha256_file(finished / PREDICTIONS) == record.sha256:
                extract_members(finished / PREDICTIONS, work.path / SMALLER)
        if work.execution.get("members", members) != members:
            # Begun for fewer: blocks of those do not count, nor does the batch that suited them.
            work.forget_execution()
            for name in (LEDGER, STORE):
                remove(work.path / name)
        batch = self._batch_size()
        named = {"input": self._path} if self._path else {}
        work.keep_execution(batch_size=batch, block_samples=self._block_rows(batch), members=members, **named)
        predictions = self._predictions(work.path)
        Part.check(self.part, predictions.blocks, SMALLER_BLOCKS)
        work.tell_total(predictions.blocks, "blocks")
        if self.part is None:
            sweep(work.path)
        count, delta = len(self.inputs), self._delta.row_bytes if self._delta else 0
        left = (predictions.blocks - predictions.records) / predictions.blocks
        require_space(work.path, round(count * (self._row_bytes + left * (self._row_bytes + delta))))
        predictions.create()
        if self.part is None:
            predictions.trim()
        self._share = BlockShare(predictions, self._holding)

    def work(self, folder: Path) -> WorkResult | None:
        """Every block (of the part) that is not done, then what makes the answer whole; None while others have some to do."""
        predictions, share = self._predictions(folder), self._share
        before, left = share.look_again(self.report, "inputs"), share.rows_left
        model, reason = self._predictor
        if reason:
            self.report.message(reason)
        batch = self.unfinished.execution["batch_size"]
        if isinstance(model, RowModel):
            model = model.with_neighbours(self.context, torch.tensor(predictions.rows_of(share.pending)), batch)
        # Those of a smaller ensemble come without their deltas; where nothing is left to do, the folder may be gone.
        known = folder / SMALLER if share.pending and not self._delta else None
        smaller = Smaller(known, self._like, len(self.inputs))
        tell, members = self.report.message, self.settings.ensemble
        predictor = BlockPredictor(model, self.inputs, members, self._like, smaller, tell, self._form)
        predictor.work(
            predictions,
            share.pending,
            batch,
            lambda done: self.report.progress(before + done, before + left, "inputs"),
        )
        return self._result(predictions, predictor) if share.is_whole() else None

    @cached_property
    def _predictor(self) -> tuple[PersonalisedModel | RowModel, str]:
        """What predicts, and by which slower way it has to run ("" if it does not)."""
        if self._row is None:
            return load_personalised(self.context)
        return make_row_model(self.context, self._row, self.inputs), ""

    @cached_property
    def inputs(self) -> Split:
        if self._given is not None:
            return self._given
        return self.context.test_split if self._split == "test" else self.context.splits[self._split]

    @cached_property
    def _like(self) -> Tree:
        """An output, (1, …)."""
        context, x = self.context, self.inputs.inputs([0])
        with torch.no_grad():
            return to_device(context.forward(context.base, to_device(x, context.device)), torch.device("cpu"))

    @property
    def _form(self) -> str | None:
        """What of a classifier's outputs are the logits of, by a training sample's label."""
        if self.context.task.kind != CLASSIFICATION:
            return None
        return logits_of(self._like, self.context.splits["all"].labels([0]))

    @property
    def _row_bytes(self) -> int:
        """Of an input's predictions: base, ensemble and members, its ρ and number."""
        output = sum(leaf.numel() * leaf.element_size() for leaf in leaves(self._like).values())
        return (self.settings.ensemble + 2) * output + 12

    @property
    def _delta(self) -> ArraySpec | None:
        """An input's sampled deltas, where they are kept."""
        if not self.settings.save_deltas:
            return None
        return ArraySpec("float32", (self.settings.ensemble, *self.context.layer.matrix_shape))

    def _batch_size(self) -> int:
        wanted, context = self.settings.batch_size, self.context
        model = self._predictor[0] if wanted == AUTO else None
        if isinstance(model, RowModel):
            wanted = samples_at_once(context, model.subject)
        elif model is not None:
            sample = prediction_bytes(model.runner, to_device(self.inputs.inputs([0]), context.device))
            numel = context.layer.numel if self.settings.save_deltas else math.prod(model.generate.denoiser.shape)
            members, draws = self.settings.ensemble, model.generate.draws
            wanted = prediction_batch(sample, numel, members, context.device, draws)
        return min(wanted, len(self.inputs))

    def _block_rows(self, batch: int) -> int:
        return prediction_rows(len(self.inputs), batch, self._row_bytes)

    def _check_part(self) -> None:
        # Work that is under way has its blocks, whatever today's settings would make: `begin` looks at those.
        if self.part and self.folder.begun() is None:
            rows = self._block_rows(self._batch_size())
            Part.check(self.part, -(-len(self.inputs) // rows), SMALLER_BLOCKS)

    def _predictions(self, folder: Path) -> PredictionBlocks:
        kept, work, members = self.unfinished.execution, self.unfinished, self.settings.ensemble
        rows, batch = kept["block_samples"], kept["batch_size"]
        return PredictionBlocks(folder, len(self.inputs), rows, work.fingerprint, members, self._delta, batch)

    def _result(self, predictions: PredictionBlocks, predictor: BlockPredictor) -> WorkResult:
        path, context, members = predictions.folder / PREDICTIONS, self.context, self.settings.ensemble
        predictions.put_together(path)
        model, name = self._predictor[0], self._row or OWN_ROW
        of_row = isinstance(model, RowModel)
        scored = {"base": BASE, name: OUTPUT} if of_row else {"base": BASE, "ocd one draw": MEMBERS, name: OUTPUT}
        content, figures = sha256_file(path), predictor.figures(predictions, context.task, scored)
        drawn = self.inputs, predictions, self._like, self.settings.pictures
        summary = {
            "query": self.query.name,
            "row": name,
            "inputs": len(self.inputs),
            "ensemble": members,
            "strength": model.strength if of_row else strength_of(context),
            **({} if of_row or not model.generate.half else {"precision": "bfloat16"}),
            **figures,
            "predictions": PREDICTIONS,
            **write_pictures(context, *drawn, self.report, name if of_row else "OCD"),
        }
        extent = Extent(value=members, reached=members, exhausted=False)
        return WorkResult(summary, digest(content), {"infer.ensemble": extent}, {PREDICTIONS: content})
