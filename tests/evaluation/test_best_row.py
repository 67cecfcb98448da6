"""Which row `ocd infer --row auto` predicts with, by losses on validation samples."""

import numpy as np
import pytest

from stages.evaluation.fitting import OnValidation
from stages.evaluation.rows import BASE, BLENDED, ENSEMBLE, Row

DRAW = np.random.default_rng(0)
BASE_LOSSES = 1 + DRAW.random(400)
NOISE = DRAW.normal(size=400)


def best(**gains):
    """Of rows whose losses are the base's, less a gain, with noise of their own."""
    names = {"ensemble": ENSEMBLE, "blended": BLENDED}
    tried = {BASE: {1.0: BASE_LOSSES}}
    for key, (gain, noise) in gains.items():
        tried[names[key]] = {1.0: BASE_LOSSES - gain + noise * NOISE}
    return OnValidation(1.0, tried).best([Row(name, None) for name in tried])


@pytest.mark.parametrize(
    ("ensemble", "blended", "found"),
    [
        # As low as the ensemble but for chance; clearly lower; and where the ensemble's own gain is not sure.
        ((0.5, 0.1), (0.505, 0.3), ENSEMBLE),
        ((0.5, 0.1), (0.6, 0.1), BLENDED),
        ((0.1, 2.0), (0.5, 0.1), BLENDED),
        # Nothing gains for sure, or by as much as counts.
        ((0.05, 2.0), (0.01, 2.0), BASE),
        ((0.001, 0.0), (0.001, 0.0), BASE),
    ],
)
def test_the_lowest_unless_it_cannot_be_told_from_the_ensemble(ensemble, blended, found):
    assert best(ensemble=ensemble, blended=blended) == found
