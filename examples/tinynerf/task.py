"""TinyNeRF on one scene: a sample is a view, x its rays and y its picture; each view gets weights of its own."""

import copy
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from nerf import TinyNeRF
from scenes import Scene, Views, load_scene
from skimage.metrics import structural_similarity
from torch import Tensor, nn

from stages.foundation.errors import SettingsError
from stages.foundation.progress import Report
from stages.tasks.data import ArrayDataset, Split
from stages.tasks.losses import REGRESSION, mse
from stages.tasks.protocol import Task

REPORTED_STEPS, GRID = 10, 10
# Initialisations that training is begun from, at most.
MOST_BEGUN = 50
# The window of the paper that defined it.
SSIM = {"data_range": 1.0, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}


class NerfTask(Task):
    """Posed views of a scene.

    Args:
        scene: a folder in Blender's format or an npz file, from this folder; by default Lego, from OCD_DATA or downloaded.
        rays: of a view, drawn anew for each gradient step of overfitting.
        glanced_rays: of a view, for each step that trains the denoiser by the rendering error.
        base_steps, base_rays, base_lr: gradient steps of Adam that train the base, rays of any views at each, learning rate.
        longer_steps: more of them for a further row of `evaluate`, the base trained on; 0: no such row.
        size, train_views, validation_views, test_views, sha256: as `scenes.load_scene`.
    """

    kind = REGRESSION
    watched = ("compositing",)

    def __init__(
        self,
        scene: str | None = None,
        *,
        rays: int = 2048,
        glanced_rays: int = 512,
        base_steps: int = 1500,
        base_rays: int = 1024,
        base_lr: float = 5e-3,
        longer_steps: int = 4500,
        size: int = 100,
        train_views: int | None = None,
        validation_views: int | None = None,
        test_views: int | None = None,
        sha256: str | None = None,
    ) -> None:
        counts = {"rays": rays, "glanced_rays": glanced_rays, "base_steps": base_steps, "base_rays": base_rays}
        for name, value in {**counts, "longer_steps": longer_steps}.items():
            least = 1 if name in counts else 0
            if not isinstance(value, int) or value < least:
                raise SettingsError(f"task.args.{name} = {value!r}: expected an integer of at least {least}", "mend ocd.toml")
        if not isinstance(base_lr, (int, float)) or not base_lr > 0:
            raise SettingsError(f"task.args.base_lr = {base_lr!r}: expected a number above 0", "mend ocd.toml")
        views = {"train_views": train_views, "validation_views": validation_views, "test_views": test_views}
        self._given = scene, {"size": size, "sha256": sha256, **views}
        self._rays, self._base_steps, self._longer_steps = rays, base_steps, longer_steps
        self._glanced_rays, self._base_rays, self._base_lr = glanced_rays, base_rays, base_lr

    @cached_property
    def scene(self) -> Scene:
        """The views, loaded when first asked for."""
        source, options = self._given
        return load_scene(source, Path(__file__).parent, **options)

    def model(self) -> nn.Module:
        """Three layers."""
        return TinyNeRF()

    def train(self) -> ArrayDataset:
        """Rays (R, 6) and colours (R, 3) of the training views."""
        return _dataset(self.scene.train)

    def validation(self) -> ArrayDataset | None:
        """Of the validation views."""
        return None if self.scene.validation is None else _dataset(self.scene.validation)

    def test(self) -> ArrayDataset:
        """Of the test views."""
        return _dataset(self.scene.test)

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        """Mean squared error of the colours, (B, R, 3), (B, R, 3) to (B,)."""
        return mse(output, y)

    def metrics(self, output: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Mean squared error, peak signal-to-noise ratio in dB, and structural similarity (Wang et al., 2004) of views."""
        error = mse(output, y)
        pairs = zip(*(self._pictures(colours).cpu().numpy() for colours in (output, y)), strict=True)
        similarity = torch.tensor([structural_similarity(*pair, channel_axis=2, **SSIM) for pair in pairs])
        return {"mse": error, "psnr": -10 * error.clamp_min(1e-10).log10(), "ssim": similarity.to(error)}

    def view(self, x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Some rays of the view, and their colours."""
        return _some_rays(x, y, self._rays, generator)

    def glance(self, x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Fewer rays, so that a step takes in more views."""
        return _some_rays(x, y, self._glanced_rays, generator)

    def coordinates(self, x: Tensor) -> Tensor:
        """Where the cameras are, (B, R, 6) to (B, 3)."""
        return x[:, 0, :3]

    def conditioning(self, x: Tensor, output: Tensor, captured: dict[str, Tensor]) -> dict[str, Tensor]:
        """I(x): what the base renders, its latents as the picture sees them (averaged with the weights they are rendered with),
        and where the camera is."""
        weights = captured["compositing"]
        total = weights.sum((1, 2)).clamp_min(1e-6).unsqueeze(1)
        latents = {
            name: torch.einsum("brs,brsf->bf", weights, captured[name]) / total for name in ("layer_input", "activation")
        }
        return {**latents, "base_output": self._pictures(output).movedim(-1, 1), "camera": self.coordinates(x)}

    def picture(self, x: Tensor, output: Tensor) -> Tensor:
        """Colours (R, 3) as a picture (H, W, 3)."""
        return self._pictures(output)

    def train_base(
        self, model: nn.Module, train: Split, validation: Split, *, report: Report, device: torch.device, **options: Any
    ) -> None:
        """Adam on random rays of random views; what is to be known of the scene is said before.

        Where the network comes to render nothing at all, as most initialisations do in the first few steps, it begins anew from
        another one: every density is on the flat side of its ReLU, and no gradient leads out of there.
        """
        for note in self.scene.notes:
            report.message(note)
        for step, error in self._trained(model, train, self._base_steps, device, report.message):
            if step % REPORTED_STEPS == 0 or step == self._base_steps:
                report.progress(step, self._base_steps, "steps", mse=error.item())

    def extra_rows(
        self, model: nn.Module, train: Split, validation: Split, *, seed: int, device: torch.device
    ) -> dict[str, Callable[[Tensor], Tensor]]:
        """What the base becomes when it is trained on, as a sceptic would do with the time that OCD takes."""
        if not self._longer_steps:
            return {}
        longer = copy.deepcopy(model).requires_grad_(True)
        with torch.enable_grad():
            for _ in self._trained(longer.train(), train, self._longer_steps, device, lambda text: None):
                pass
        longer.eval()
        return {f"base trained {1 + self._longer_steps / self._base_steps:.3g} times as long": longer}

    def _trained(
        self, model: nn.Module, train: Split, steps: int, device: torch.device, tell: Callable[[str], None]
    ) -> Iterator[tuple[int, Tensor]]:
        """Train: the number of each step, and its mean squared error."""
        x, y = (part.flatten(0, 1).to(device) for part in train.batch(range(len(train))))
        optimizer, step, begun = torch.optim.Adam(model.parameters(), lr=self._base_lr), 0, 1
        while step < steps:
            rows = torch.randint(len(x), (self._base_rays,), device=device)
            error = F.mse_loss(model(x[rows].unsqueeze(0))[0], y[rows])
            optimizer.zero_grad()
            error.backward()
            if begun < MOST_BEGUN and not model.layer1.weight.grad.any():
                for layer in (model.layer1, model.layer2, model.layer3):
                    layer.reset_parameters()
                optimizer, step, begun = torch.optim.Adam(model.parameters(), lr=self._base_lr), 0, begun + 1
                continue
            optimizer.step()
            step += 1
            yield step, error.detach()
        if begun > 1:
            tell(f"begun {begun} times: after the other initialisations the network rendered nothing")

    def _pictures(self, colours: Tensor) -> Tensor:
        """(…, H·W, 3) to (…, H, W, 3)."""
        return colours.reshape(*colours.shape[:-2], *self.scene.size, 3)


def _some_rays(x: Tensor, y: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rays (R, 6) and colours (R, 3) to at most `count` of them, drawn at random."""
    drawn = torch.randperm(len(x), generator=generator)[:count]
    return x[drawn], y[drawn]


def _dataset(views: Views) -> ArrayDataset:
    return ArrayDataset(views.rays, views.colours)


class PooledPicture(nn.Module):
    """The default encoder of a rendered picture: averaged over a grid of 10×10 places, then one fully connected layer.

    Args:
        shape: of the field, (3, H, W).
        width: of what it gives.
    """

    def __init__(self, shape: tuple[int, int, int], width: int) -> None:
        super().__init__()
        self.shape, self.channels = shape, shape[0]
        self.layer = nn.Linear(shape[0] * GRID * GRID, width)

    def forward(self, values: Tensor) -> Tensor:
        """(B, 3·H·W) to (B, width)."""
        return self.layer(F.adaptive_avg_pool2d(values.view(-1, *self.shape), GRID).flatten(1))
