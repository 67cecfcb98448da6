"""The conditioning (Eq. 7) against a hook of one's own, and what is made smaller before it is stored."""

import pytest
import torch
import torch.nn.functional as F
from overfitters import LAYERS, Custom, forward, make_problem
from torch import nn

from stages.foundation.errors import TaskError
from stages.per_sample.capture import capture, reduce_fields
from stages.per_sample.layer import find_layer


def seen_by_a_hook(model, module, x):
    seen = {}
    handle = module.register_forward_hook(lambda _, args, output: seen.update(layer_input=args[0], activation=output))
    seen["base_output"] = model(x)
    handle.remove()
    return seen


@pytest.mark.parametrize(("name", "layer"), LAYERS)
def test_capture_is_what_a_hook_sees(name, layer):
    model, x, _ = make_problem(name, torch.float32)
    wanted = seen_by_a_hook(model, model.get_submodule(layer.rpartition(".")[0]), x)
    output, fields = capture(model, find_layer(model, layer), forward, x)
    assert torch.equal(output, wanted["base_output"])
    assert list(fields) == ["layer_input", "activation", "base_output"]
    for field, value in wanted.items():
        assert torch.equal(fields[field], value), field


def of_rows(self, x):
    """Rows of all samples in one batch, and a module called twice."""
    hidden = self.fc(x.flatten(0, 1)).relu()
    return {"a": self.fc(hidden).view(*x.shape).sum(1), "b": hidden.view(len(x), -1)[:, 0]}


def fields_of(model, name, x):
    return capture(model, find_layer(model, name), forward, x)[1]


def one_layer(run):
    torch.manual_seed(0)
    return Custom(run, fc=nn.Linear(3, 3), never=nn.Linear(3, 3)).requires_grad_(False)


def test_capture_gives_each_sample_its_rows_and_counts_the_last_call():
    model, x = one_layer(of_rows), torch.randn(4, 5, 3)
    fields, output, hidden = fields_of(model, "fc.weight", x), model(x), model.fc(x).relu()
    torch.testing.assert_close(fields["layer_input"], hidden)
    torch.testing.assert_close(fields["activation"], model.fc(hidden))
    torch.testing.assert_close(fields["base_output"], torch.cat([output["a"], output["b"].unsqueeze(1)], dim=1))


@pytest.mark.parametrize(
    ("run", "name", "x", "says"),
    [
        (of_rows, "never.weight", torch.ones(4, 5, 3), r"the module of never.weight is not called in the forward pass"),
        # Three rows for all samples of a batch together.
        (
            lambda self, x: x + self.fc(x[:3]).sum(0),
            "fc.weight",
            torch.ones(4, 3),
            r"the input of fc.weight has shape \(3, 3\) for a batch of 4",
        ),
    ],
    ids=["not called", "rows that do not divide into samples"],
)
def test_layers_that_give_no_fields(run, name, x, says):
    model = one_layer(run)
    with pytest.raises(TaskError, match=says):
        fields_of(model, name, x)
    assert not any(module._forward_hooks for module in model.modules())


def test_capture_of_a_layer_called_by_keyword():
    model, x = one_layer(lambda self, x: self.fc(input=x)), torch.randn(4, 3)
    fields = fields_of(model, "fc.weight", x)
    assert torch.equal(fields["layer_input"], x)
    assert torch.equal(fields["activation"], model.fc(x))


def test_the_activation_is_taken_before_a_nonlinearity_that_works_in_place():
    model, x = one_layer(lambda self, x: self.fc(x).relu_()), torch.randn(5, 3)
    wanted = F.linear(x, model.fc.weight, model.fc.bias)
    torch.testing.assert_close(fields_of(model, "fc.weight", x)["activation"], wanted)


def test_the_layer_input_is_taken_before_a_residual_sum_in_place():
    def run(self, x):
        hidden = x + 1
        hidden += self.fc(hidden)
        return hidden

    x = torch.randn(4, 3)
    torch.testing.assert_close(fields_of(one_layer(run), "fc.weight", x)["layer_input"], x + 1)


def not_reduced(name, value):
    return None


@pytest.mark.parametrize(
    ("kind", "wide", "kept", "axes"),
    [
        # 4,096 numbers exactly are not too wide.
        (nn.Conv2d, (8, 32, 32), (4, 32, 32), [2, 3]),
        (nn.Linear, (10, 7, 64), (10, 7, 5), [1, 2]),
    ],
    ids=["of a convolution over the picture", "of others over all but the last axis"],
)
def test_wide_fields_are_pooled(kind, wide, kept, axes):
    fields = {"layer_input": torch.randn(2, *wide), "activation": torch.randn(2, *kept)}
    found, notes = reduce_fields(fields, kind, not_reduced)
    torch.testing.assert_close(found["layer_input"], fields["layer_input"].mean(axes))
    assert torch.equal(found["activation"], fields["activation"])
    assert notes == {"layer_input": f"mean over axes {axes} of {wide}"}


def test_a_wide_vector_has_no_axis_to_pool_over():
    fields = {"base_output": torch.randn(2, 5000)}
    found, notes = reduce_fields(fields, nn.Linear, not_reduced)
    assert torch.equal(found["base_output"], fields["base_output"])
    assert notes == {}


def test_the_tasks_own_reduction_wins():
    fields = {"layer_input": torch.randn(2, 8, 32, 32), "activation": torch.randn(2, 6)}
    asked = []

    def reduce(name, value):
        asked.append(name)
        return value.amax((2, 3)) if name == "layer_input" else None

    found, notes = reduce_fields(fields, nn.Conv2d, reduce)
    assert "layer_input" in asked
    assert torch.equal(found["layer_input"], fields["layer_input"].amax((2, 3)))
    assert torch.equal(found["activation"], fields["activation"])
    assert notes == {"layer_input": "reduced by the task"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.float16])
def test_fields_are_stored_in_single_precision(dtype):
    found, _ = reduce_fields({"layer_input": torch.arange(6).view(2, 3).to(dtype)}, nn.Embedding, not_reduced)
    assert torch.equal(found["layer_input"], torch.arange(6.0).view(2, 3))
