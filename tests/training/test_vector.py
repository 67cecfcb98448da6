"""The preset vector: output vectors in place of whole deltas, from the store to the prediction."""

import numpy as np
import pytest
import reference
import torch
from folders import reader_of
from planted import HELPING
from trainings import rows_of

from stages.foundation.seeds import generator
from stages.prediction.open_run import open_run
from stages.store.reader import StoreReader
from stages.training.batches import VECTORS

VECTOR = ["--set", "train-diffusion.preset=vector"]


@pytest.fixture(scope="module")
def helped(make_run):
    """A run whose deltas are outer products, which nobody has asked for."""
    return make_run(HELPING, "planted")


def test_auto_keeps_factors_and_takes_the_vector_preset(ocd, helped):
    settings = helped.read("collect/manifest.json")["identity"]["settings"]
    assert settings["collect.store"] == "factored"
    assert ocd.json(helped, "train-diffusion")["preset"] == "vector"
    denoiser = helped.read("train-diffusion/denoiser.json")
    assert (denoiser["preset"], denoiser["shape"]) == ("vector", [3, 3])


@pytest.mark.parametrize("change", [{"optimizer": "adam"}, {"weight_decay": 0.1}], ids=["adam", "weight decay"])
def test_deltas_that_are_no_outer_products_are_kept_whole(ocd, project, change):
    folder = project(HELPING | {"collect": HELPING["collect"] | change}, "collect", code="planted")
    assert folder.read("collect/manifest.json")["identity"]["settings"]["collect.store"] == "dense"
    said = ocd(folder, "train-diffusion", *VECTOR, code=2).stderr
    assert said.endswith(
        "error: train-diffusion.preset = 'vector' needs deltas that are kept as factors, and this store has whole ones\n"
        "  use another preset, or collect them with --set collect.store=factored, which takes sgd without weight_decay and a "
        "Linear that sees one vector a sample\n"
    )
    assert not (folder.run / "train-diffusion.wip").exists()


def test_what_a_denoiser_was_is_not_asked_of_another_store(ocd, project):
    """What `auto` had come to with factors does not count where the deltas are whole now."""
    folder = project(HELPING, "train-diffusion", code="planted")
    adam = ("--set", "collect.optimizer=adam", "--set", "collect.lr=0.01")
    ocd(folder, "collect", "--force", *adam)
    assert "train-diffusion (stale; needs --force): train " in ocd(folder, "train-diffusion", "--dry-run", *adam).stdout
    ocd(folder, "train-diffusion", "--force", *adam)
    assert ocd.json(folder, "train-diffusion", *adam)["preset"] == "mlp"


def test_parts_go_on_with_the_store_that_was_begun(ocd, project):
    """As matrices there are more blocks, and so more parts, than there would be of factors."""
    folder = project(
        HELPING | {"collect": {"optimizer": "sgd", "lr": 0.3, "block_samples": 40}}, "select-layer", code="planted"
    )
    ocd(folder, "collect", "--part", "1/2", "--set", "collect.store=dense")
    ocd(folder, "collect", "--part", "2/2")
    assert folder.read("collect/manifest.json")["identity"]["settings"]["collect.store"] == "dense"
    assert StoreReader.of(folder.run / "collect").description.arrays["delta"].factors is None


def test_a_store_from_before_stays_as_it_was_made(ocd, project):
    """More samples go into it as the first ones did, whatever `auto` stands for now."""
    folder = project(HELPING, "collect", code="planted")
    more = ["--set", "collect.store=dense", "--set", "collect.samples=100"]
    ocd(folder, "collect", "--force", *more)
    ocd(folder, "collect")
    store = StoreReader.of(folder.run / "collect")
    assert len(store) == 400
    assert store.description.arrays["delta"].factors is None


def test_what_it_learns_from_are_the_stores_output_vectors(helped):
    reader, rows = reader_of(helped), rows_of(helped, deltas=VECTORS)
    batch = next(rows.batches(0))
    assert batch.deltas.shape == (7, 3, 1)
    assert np.array_equal(batch.deltas.squeeze(2).numpy(), reader.read("delta_output")[batch.numbers])
    u, h = reader.read("delta_output"), reader.read("delta_input")
    np.testing.assert_allclose(np.linalg.norm(u, axis=1) * np.linalg.norm(h, axis=1), reader.read("rho"), rtol=1e-5)


def test_predictions_are_those_of_the_matrices(helped):
    """A copy of the model under θ + u hᵀ gives the same outputs."""
    model, x = open_run(helped.config), torch.randn(6, 3, generator=generator("vector"))
    found = model.predict(x, 3)
    deltas = found.deltas.matrices()
    assert found.deltas.values.shape == (6, 3, 3)
    wanted = reference.predict_loop(model.model, "0.weight", x, deltas)
    torch.testing.assert_close(found.members.transpose(0, 1), wanted, rtol=1e-5, atol=1e-6)
    # Each has the length that the scale network predicts, and is along what the layer sees.
    torch.testing.assert_close(deltas.flatten(2).norm(dim=2), found.rho.unsqueeze(1).expand(6, 3), rtol=1e-5, atol=1e-7)
    across = deltas - (deltas @ x.view(6, 1, 3, 1)) @ x.view(6, 1, 1, 3) / x.square().sum(1).view(6, 1, 1, 1)
    assert float(across.norm()) < 1e-6 * float(deltas.norm())


def test_an_input_of_zeros_stays_with_the_base(helped):
    found = open_run(helped.config).predict(torch.zeros(2, 3), 2)
    assert torch.equal(found.members, found.base_output.expand(2, 2, 3))


def test_evaluate_compares_with_directions_of_output_vectors(ocd, helped):
    """Every row that is made of generated deltas, at strength 1 the same as infer's answer."""
    folder = helped.copy(helped.root.parent / "evaluated")
    results = ocd.json(folder, "evaluate", "--set", "evaluate.longer_base=false")
    rows = {row["name"]: row["metrics"]["mse"]["mean"] for row in results["rows"]}
    answer = ocd.json(folder, "infer")["metrics"]
    assert rows["ocd ensemble"] == pytest.approx(answer["ocd ensemble"]["mse"], rel=1e-5)
    assert {"no scaling", "ocd one draw", "mean network", "shuffled conditioning", "random direction"} <= rows.keys()
    assert rows["ocd ensemble"] < rows["shuffled conditioning"]
