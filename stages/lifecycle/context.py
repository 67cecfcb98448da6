"""What a run's stages work with: its task, data splits, base, layer, device and seed, each loaded when first asked for."""

import os
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from stages.foundation.errors import ArtifactError, SettingsError
from stages.foundation.no_doubles import MPS
from stages.foundation.processes import local_count, local_rank, under_torchrun
from stages.foundation.progress import Report, Silent
from stages.foundation.seeds import global_seed
from stages.foundation.tensors import load_model
from stages.foundation.trees import Tree, to_device
from stages.per_sample.layer import Layer, find_layer
from stages.per_sample.single_precision import HALF, in_single_precision
from stages.run_directory.folders import checked_file, folder_of
from stages.run_directory.format import Manifest
from stages.run_directory.project import Project
from stages.tasks.data import Split
from stages.tasks.identity import dataset_identity
from stages.tasks.loader import forward, load_splits, load_task, load_test
from stages.tasks.model import make_model, put_in_eval_mode, settle_embeddings
from stages.tasks.protocol import Task

BASE_FILE = "base.safetensors"
# Said by every command that looks at such samples.
PROBABLY_SEEN = (
    "the base's weights were imported and no validation set is given, so the held-out samples are rows of train, which these "
    "weights were probably trained on"
)
GIVE_VALIDATION = "name samples that the weights were not trained on with task.validation, or in the Task's validation()"


class RunContext:
    """A run: what its stages share; the report hears of the progress of whatever is done."""

    def __init__(self, project: Project, report: Report | None = None) -> None:
        self.project = project
        self.report: Report = report or Silent()
        self._identities: dict[str, str | None] = {}
        self._single: tuple[str, nn.Module] | None = None

    @property
    def seed(self) -> int:
        return self.project.seed

    @cached_property
    def device(self) -> torch.device:
        """The device of `[run] device`.

        Raises:
            SettingsError: cuda or mps asked for and absent; more processes than CUDA devices.
        """
        name = self.project.settings.run.device
        if name == "cuda" and not torch.cuda.is_available():
            raise SettingsError(
                "run.device = 'cuda', but torch sees no CUDA device", "use --device cpu, or install a CUDA build of torch"
            )
        if name == MPS and not torch.backends.mps.is_available():
            raise SettingsError(
                "run.device = 'mps', but torch sees no such device", "use --device cpu; mps takes a Mac of Apple's own chips"
            )
        if name == MPS and under_torchrun():
            raise SettingsError("run.device = 'mps' under torchrun: processes cannot share it", "use --device cpu")
        if name == MPS:
            return torch.device(MPS)
        if name == "cpu" or not torch.cuda.is_available():
            return torch.device("cpu")
        # Some of cuDNN's convolutions are not repeatable.
        torch.backends.cudnn.deterministic = True
        if local_rank() >= (gpus := torch.cuda.device_count()):
            raise SettingsError(
                f"torchrun started {local_count()} processes on this machine, which has {gpus} CUDA device{'s' * (gpus > 1)}",
                f"use torchrun --nproc-per-node={gpus}, or --device cpu",
            )
        # For deterministic products (torch's notes on reproducibility); read when the first one is computed.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # By number: in other threads than this one plain "cuda" is the first.
        return torch.device("cuda", local_rank())

    def wait(self) -> None:
        """Until the device has done what it was told to: before a clock is looked at."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == MPS:
            torch.mps.synchronize()

    @cached_property
    def task(self) -> Task:
        settings = self.project.settings
        return load_task(settings.task, self.project.root, condition_on_x=settings.collect.condition_on_x)

    @cached_property
    def splits(self) -> dict[str, Split]:
        """train, validation and all."""
        return load_splits(self.task, self.project.settings.task, self.seed)

    @property
    def validation_is_given(self) -> bool:
        """Whether the validation set is the task's own, not rows held out of train."""
        return self.splits["validation"].dataset is not self.splits["all"].dataset

    @property
    def validation_is_seen(self) -> bool:
        """Whether the base may have been trained on the validation samples: imported weights, and rows held out of train."""
        return "weights" in self.manifest_of("train-base").sources and not self.validation_is_given

    @cached_property
    def test_split(self) -> Split:
        return load_test(self.task)

    def new_model(self) -> nn.Module:
        """The task's model with the run's seeded initialisation."""
        with global_seed(self.seed, "model"):
            return make_model(self.task, lambda: self.splits["all"].inputs([0]))

    @cached_property
    def base(self) -> nn.Module:
        """The trained base, frozen, in eval mode, on the device."""
        return self.another_base()

    def another_base(self) -> nn.Module:
        """The same in a model of its own."""
        model = self.new_model()
        load_model(self.file_of("train-base", BASE_FILE), model)
        settle_embeddings(model)
        if self.device.type == MPS and any(value.dtype == torch.float64 for value in model.state_dict().values()):
            raise SettingsError("the model has weights of float64, which mps lacks", "use --device cpu")
        model.to(self.device)
        put_in_eval_mode(model)
        return model.requires_grad_(False)

    @cached_property
    def layer(self) -> Layer:
        return find_layer(self.base, self.manifest_of("select-layer").content)

    def base_to_overfit(self, layer: Layer | None = None) -> nn.Module:
        """The base, with the layer (by default the selected one) computing in float32 whatever the rest does: of a base of half
        precision a model of its own."""
        layer = layer or self.layer
        if self.base.get_parameter(layer.name).dtype not in HALF:
            return self.base
        if self._single is None or self._single[0] != layer.name:
            model, x = self.another_base(), to_device(self.splits["all"].inputs([0, 0]), self.device)
            in_single_precision(model, layer, lambda: self.forward(model, x))
            self._single = layer.name, model
        return self._single[1]

    def forward(self, model: nn.Module, x: Tree) -> Tree:
        """The task's forward pass: inputs (B, …) to outputs (B, …)."""
        return forward(self.task, model, x)

    def manifest_of(self, stage: str) -> Manifest:
        """The manifest of an earlier stage.

        Raises:
            ArtifactError: it has none.
        """
        manifest = folder_of(self.project, stage).manifest()
        if manifest is None:
            raise ArtifactError(f"{stage} is missing", f"run: ocd {stage}")
        return manifest

    def file_of(self, stage: str, name: str) -> Path:
        """A file of an earlier stage, hashed before it is read.

        Raises:
            ArtifactError: it is missing, or its content changed.
        """
        return checked_file(folder_of(self.project, stage), self.manifest_of(stage), name)

    def hash_dataset(self, role: str) -> str | None:
        """The identity of a dataset that only code can load, hashed once; None where the task has no such set."""
        if role not in self._identities:
            self._identities[role] = self._identity_of(role)
        return self._identities[role]

    def _identity_of(self, role: str) -> str | None:
        if role == "validation" and not self.validation_is_given:
            return None
        split = self.test_split if role == "test" else self.splits["all" if role == "train" else role]
        return dataset_identity(split.dataset, role)
