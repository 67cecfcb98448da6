"""Encoders of conditioning fields as `[train-diffusion]` names them: ours, or modules of the user's own."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stages.diffusion.denoiser import Denoiser
from stages.diffusion.denoisers import make_denoiser
from stages.diffusion.encoders import KINDS, LINEAR, make_encoders
from stages.diffusion.scale import ScaleNetwork
from stages.foundation.errors import ComputeError, DataError, SettingsError, TaskError
from stages.foundation.specs import is_code
from stages.foundation.tensors import load_tensors
from stages.run_directory.descriptions import DenoiserDescription, ScaleDescription
from stages.run_directory.format import StoreDescription
from stages.run_directory.project import Project
from stages.run_directory.sources import encoder_weights
from stages.tasks.modules import load_object
from stages.tasks.user_code import user_code

SETTING = "train-diffusion.encoders"
MEND = "mend it, then run the same command again"


def described_encoders(project: Project, store: StoreDescription) -> dict[str, dict[str, Any]]:
    """The fields that have an encoder of their own: {name: {"kind", "shape"}}.

    Raises:
        SettingsError: fields or kinds that do not exist.
    """
    chosen = project.settings.train_diffusion.encoders
    for name, kind in chosen.items():
        if name not in store.fields:
            raise SettingsError(f"{SETTING}: the store has no field {name!r}", f"it has {', '.join(store.fields)}")
        if kind not in (LINEAR, *KINDS) and not is_code(kind):
            raise SettingsError(
                f"{SETTING}.{name} = {kind!r}: expected {', '.join((LINEAR, *KINDS))}, or a module of yours",
                'name one as "module:name", a callable (shape, width) -> nn.Module',
            )
    return {name: {"kind": kind, "shape": store.arrays[name].shape[1:]} for name, kind in chosen.items() if kind != LINEAR}


def build_denoiser(project: Project, description: DenoiserDescription, *, begin: bool = False) -> Denoiser:
    """The denoiser of a description, with encoders of the user's own where it names them; to `begin`, with VGG-11's weights as
    the settings give them, which are in the snapshot later.

    Raises:
        SettingsError, TaskError, DataError: encoders that do not exist, raise, or do not fit their fields.
    """
    own = {entry.kind for entry in description.encoders.values() if is_code(entry.kind)}
    modules = {kind: _loaded(project, kind) for kind in sorted(own)}
    return make_denoiser(description.as_json(), _weights(project) if begin else None, modules)


def build_scale(description: ScaleDescription) -> ScaleNetwork:
    """The scale network of a description."""
    described = {name: entry.as_json() for name, entry in description.encoders.items()}
    return ScaleNetwork(description.fields, description.width, make_encoders(described, description.width))


class OwnEncoder(nn.Module):
    """A module of the user's own: what it raises is told with the user's own frames, and what it gives is checked.

    Args:
        spec: "module:name", for messages.
        module: (B, numbers) to (B, width).
        shape: of the field.
        width: of what it gives.
    """

    def __init__(self, spec: str, module: nn.Module, shape: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.module, self._spec, self._width = module, spec, width
        # An attribute of another meaning may have the same name.
        if getattr(module, "channels", None) == shape[0]:
            self.channels = shape[0]

    def forward(self, values: Tensor) -> Tensor:
        """The module's output, checked."""
        wanted = (len(values), self._width)
        if values.is_meta:
            return self._sketched(values, wanted)
        try:
            with user_code(self._spec):
                found = self.module(values)
        except ComputeError as error:
            if isinstance(error.__cause__, torch.OutOfMemoryError):
                # Whoever trains takes fewer at once.
                raise error.__cause__ from None
            raise
        if not isinstance(found, Tensor) or found.shape != wanted:
            given = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise TaskError(f"{self._spec} gave {given} for {len(values)} samples, expected {wanted}", MEND)
        return found

    def _sketched(self, values: Tensor, wanted: tuple[int, int]) -> Tensor:
        """For estimates, which are made without numbers; code that looks at these does not count."""
        try:
            found = self.module(values)
        except Exception:
            return values.new_empty(wanted)
        return found if isinstance(found, Tensor) and found.is_meta else values.new_empty(wanted)


def _loaded(project: Project, spec: str) -> Callable[[tuple[int, ...], int], nn.Module]:
    make = load_object(project.root, spec, SETTING)

    def checked(shape: tuple[int, ...], width: int) -> nn.Module:
        device = torch.get_default_device()
        # Code of others may look at numbers, which the meta device does not have.
        with torch.device("cpu"):
            with user_code(f"{spec}({shape}, {width})"):
                module = make(shape, width)
            if not isinstance(module, nn.Module):
                raise TaskError(f"{spec} gave {type(module).__name__}, expected an nn.Module", MEND)
            encoder = OwnEncoder(spec, module, shape, width).eval()
            with torch.no_grad():
                encoder(torch.zeros(2, torch.Size(shape).numel()))
        return encoder.train().to(device)

    return checked


def _weights(project: Project) -> dict[str, Tensor] | None:
    path = encoder_weights(project)
    if path is None:
        return None
    if path.suffix != ".safetensors":
        raise DataError(f"{path} is not a safetensors file", "save them with safetensors.torch.save_file")
    return load_tensors(path, DataError)
