"""What the tests of the denoisers share: small ones of every preset, numbers to feed them, and four deltas known beforehand."""

import torch
import torch.nn.functional as F

from stages.diffusion.delta_batch import DeltaBatch
from stages.diffusion.denoiser import unit
from stages.diffusion.denoisers import make_denoiser, resolve
from stages.diffusion.scale import ScaleNetwork
from stages.foundation.config import TrainDiffusionTable

SHAPE, WIDTHS = (3, 4), {"layer_input": 6, "activation": 3, "base_output": 2}
ROWS = 5
# Of four deltas, how likely each is for conditioning of either kind.
PRIORS = torch.tensor([[0.85, 0.05, 0.05, 0.05], [0.05, 0.05, 0.05, 0.85]], dtype=torch.float64)

# Of torchvision's vgg11: places of the convolutions, channels in and out.
CONVOLUTIONS = {0: (3, 64), 3: (64, 128), 6: (128, 256), 8: (256, 256), 11: (256, 512)}
CONVOLUTIONS |= dict.fromkeys((13, 16, 18), (512, 512))


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_fields(rows=ROWS, seed=0):
    """One field has axes of its own, as a convolution's would."""
    return {
        "layer_input": random(rows, 2, 3, seed=seed) * 3 + 1,
        "activation": random(rows, 3, seed=seed + 1),
        "base_output": random(rows, 2, seed=seed + 2),
    }


def shaken(network, size=0.1):
    """A network as after some training: nothing is zero any more."""
    with torch.no_grad():
        for i, parameter in enumerate(network.parameters()):
            parameter.add_(size * random(*parameter.shape, seed=100 + i))
    return network


def describe(preset, shape, fields=WIDTHS, **settings):
    """A denoiser's description as train-diffusion writes it."""
    decided = resolve(TrainDiffusionTable(preset=preset, **settings).model_dump(), shape)
    return {**decided, "shape": list(shape), "fields": fields}


def sketch(*args, **named):
    """A denoiser of any size, without memory."""
    with torch.device("meta"):
        return make_denoiser(describe(*args, **named))


def make(preset, shape=(5, 7), size=0.1, **settings):
    """A narrow denoiser in which nothing is zero any more."""
    torch.manual_seed(0)
    return shaken(make_denoiser(describe(preset, shape, **{"width": 16, **settings})), size)


def make_scale():
    """A scale network as after some training."""
    torch.manual_seed(0)
    network = ScaleNetwork(WIDTHS, 8)
    network.fit([make_fields(50)], random(50).exp())
    return shaken(network)


def numbers_of(network):
    """How many its parameters have."""
    return sum(p.numel() for p in network.parameters())


def toy_rows(count, seed):
    """Samples of two kinds; the kind is the conditioning, and decides how likely each of four unit deltas is."""
    draw = torch.Generator().manual_seed(seed)
    kind = torch.randint(2, (count,), generator=draw)
    picked = torch.multinomial(PRIORS[kind], 1, generator=draw).squeeze(1)
    return DeltaBatch({"kind": F.one_hot(kind, 2).float()}, torch.ones(count), toy_deltas()[picked]), kind


def toy_deltas():
    return unit(random(4, 4, 4, seed=77))


def torchvision_weights():
    """As torchvision's `vgg11().state_dict()`, with a classifier of fewer numbers."""
    found = {}
    for place, (channels, width) in CONVOLUTIONS.items():
        # Of a size that keeps the numbers' from layer to layer.
        found[f"features.{place}.weight"] = random(width, channels, 3, 3, seed=place) * (2 / (9 * channels)) ** 0.5
        found[f"features.{place}.bias"] = 0.1 * random(width, seed=100 + place)
    for place in (0, 3, 6):
        found |= {f"classifier.{place}.weight": random(4, 4), f"classifier.{place}.bias": random(4)}
    return found
