"""A plain network from the conditioning to the output: what can be had without changing a weight."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stages.diffusion.conditioning import ConditioningEncoder, Fields
from stages.diffusion.delta_batch import DeltaBatch
from stages.diffusion.denoisers import DENSE_BLOCKS, UNETS, VECTOR_WIDTH
from stages.diffusion.encoders import make_encoders
from stages.diffusion.mlp import ModulatedBlock
from stages.diffusion.neighbour_encoder import NEIGHBOURS
from stages.evaluation import rows as row
from stages.evaluation.rows import Row, output_row
from stages.evaluation.subject import Batch, EvaluatedSamples, Subject
from stages.foundation.files import remove
from stages.foundation.seeds import global_seed
from stages.foundation.tensors import load_tensors
from stages.lifecycle.branches import BRANCHES
from stages.lifecycle.context import RunContext
from stages.prediction.for_training import judged_on, neighbour_search, store_of
from stages.run_directory.descriptions import DenoiserDescription
from stages.run_directory.pipeline import AUTO
from stages.tasks.data import Split
from stages.tasks.loader import losses
from stages.tasks.views import has_views
from stages.training.batches import NOTHING, TrainingBatches
from stages.training.plan import Plan
from stages.training.run import TrainingRun
from stages.training.trainer import Stream, Trainer

FOLDER, STAGE = "plain-network", "train-diffusion"


class PlainNetwork(nn.Module):
    """The trunk of the vector denoiser, from the conditioning to a change of the output; it begins at zero.

    Args:
        known: the denoiser, whose fields it sees, neighbours among them.
        numbers: of an output.
    """

    def __init__(self, known: DenoiserDescription, numbers: int, width: int, blocks: int) -> None:
        super().__init__()
        near = {name: entry.as_json() for name, entry in known.encoders.items() if name == NEIGHBOURS}
        self.encoder = ConditioningEncoder(known.fields, width, make_encoders(near, width))
        self.embed = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.blocks = nn.ModuleList(ModulatedBlock(width) for _ in range(blocks))
        self.leave = nn.Sequential(nn.LayerNorm(width), nn.SiLU(), nn.Linear(width, numbers))
        nn.init.zeros_(self.leave[-1].weight)
        nn.init.zeros_(self.leave[-1].bias)

    def forward(self, fields: Fields) -> Tensor:
        """Fields (B, …) to (B, numbers)."""
        hidden = e = self.embed(self.encoder(fields))
        for block in self.blocks:
            hidden = block(hidden, e)
        return self.leave(hidden)


def plain_network_row(context: RunContext, subject: Subject) -> Row | str:
    """f_θ(x) + g(I(x)), g trained by the task's loss on the samples, in the batches and for the steps that the denoiser had; or
    why there is none.

    Raises:
        ComputeError: a loss that is not finite.
    """
    if has_views(context.task):
        return "the task shows samples in parts, of which a network of the conditioning alone knows nothing"
    example = Batch(subject, EvaluatedSamples(context.splits["all"], torch.arange(1)), torch.arange(1)).first.output
    if not isinstance(example, Tensor) or not example.is_floating_point():
        return "the base's output is not one tensor"
    network = _Training(context, subject, example[0].numel()).network()

    def predict(batch: Batch) -> Tensor:
        return _changed(batch, network, batch.seen)

    return output_row(row.PLAIN, predict)


def _changed(batch: Batch, network: PlainNetwork, fields: Fields) -> Tensor:
    """The base's output with the network's change by what is seen of the samples, (B, …)."""
    output = batch.first.output
    return output + network(fields).view_as(output).to(output)


class _Training:
    """Trains the network in a folder of its own, where it goes on after a stop, and is found when asked for again."""

    def __init__(self, context: RunContext, subject: Subject, numbers: int) -> None:
        self._context, self._subject = context, subject
        manifest = context.manifest_of(STAGE)
        self._settings, self._steps = manifest.identity.settings, manifest.summary["steps"]
        self._fingerprint = manifest.content
        reader, search = store_of(context), neighbour_search(context)
        near, self._judged = search.found if search else None, None
        self._samples = torch.from_numpy(reader.read("sample_index"))
        self._batches = TrainingBatches(
            reader,
            deltas=NOTHING,
            held_out=self._of("held_out"),
            batch_size=self._of("batch_size"),
            seed=context.seed,
            device=torch.device("cpu"),
            memory=AUTO,
            neighbours=near,
        )
        self._stream = Stream(self._batches.batches)
        if self._of("tune_after"):
            self._judged = judged_on(context, subject.overfitter, self._of("tune_samples") * self._of("evaluate_steps"), near)
        known = DenoiserDescription.read(context.file_of(STAGE, "denoiser.json"))
        # A U-Net's width counts channels.
        size = (VECTOR_WIDTH, DENSE_BLOCKS) if known.preset in UNETS else (known.width, known.blocks)
        with global_seed(context.seed, "evaluate", row.PLAIN):
            self._network = PlainNetwork(known, numbers, *size)
        self._network.encoder.normalise.fit(self._batches.parts())
        self._network.encoder.noise = self._of("conditioning_noise")
        self._network.to(context.device)

    def _of(self, name: str) -> Any:
        """A setting that the denoiser was trained with."""
        return self._settings[f"{STAGE}.{name}"]

    def network(self) -> PlainNetwork:
        """The best averaged weights."""
        table, report = self._context.project.settings.train_diffusion, self._context.report
        optimizer = torch.optim.AdamW(self._network.parameters(), lr=self._of("lr"), weight_decay=0.0, fused=True)
        trainer = Trainer(self._network, optimizer, self._step_losses)
        plan = Plan(self._steps, table.evaluate_steps, table.checkpoint_steps, 0, table.checkpoint_minutes)
        report.start(row.PLAIN)
        run = TrainingRun(self._folder(), self._fingerprint, trainer, lambda: self._figures(trainer.averaged), plan, report)
        with contextlib.closing(self._stream):
            trained = run.run()
        self._network.load_state_dict(load_tensors(trained.snapshot))
        return self._network.eval().requires_grad_(False)

    def _folder(self) -> Path:
        """Where it is trained; those of other denoisers are of no use any more."""
        branches = self._context.project.run_path / BRANCHES
        folder = branches / f"{FOLDER}-{self._fingerprint[:12]}"
        for other in branches.glob(f"{FOLDER}-*"):
            if other != folder:
                remove(other)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _step_losses(self, step: int) -> Iterator[Tensor]:
        rows = self._stream.at(step)
        with global_seed(self._context.seed, "evaluate", row.PLAIN, step):
            yield self._losses(self._network, rows, self._context.splits["all"], self._samples[rows.numbers]).mean()

    def _losses(self, network: PlainNetwork, rows: DeltaBatch, split: Split, positions: Tensor) -> Tensor:
        """The task's losses of samples at positions of a split, of which `rows` are seen, (B,)."""
        batch = Batch(self._subject, EvaluatedSamples(split, positions), positions)
        return losses(self._context.task, _changed(batch, network, rows.to(self._context.device).fields), batch.y)

    @torch.no_grad()
    def _figures(self, network: PlainNetwork) -> dict[str, float]:
        """The mean loss of the samples that a tuned denoiser is judged on, else of the rows held out."""
        network.eval()
        rows, split = self._batches.held_out, self._context.splits["all"]
        positions = self._samples[rows.numbers]
        if self._judged is not None:
            rows, split, positions = self._judged.rows, self._judged.split, self._judged.rows.numbers
        parts = torch.arange(len(rows)).split(self._batches.batch_size)
        found = [self._losses(network, rows.take(part), split, positions[part]) for part in parts]
        return {"score": float(torch.cat(found).double().mean())}
