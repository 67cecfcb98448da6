"""The conditioning (Eq. 7) against a hook of one's own, and what is made smaller before it is stored."""

import pytest
import torch
import torch.nn.functional as F
from overfitters import LAYERS, forward, make_problem
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


class Rows(nn.Module):
    """Rows of all samples in one batch, and a module called twice."""

    def __init__(self):
        super().__init__()
        self.fc, self.never = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        hidden = self.fc(x.flatten(0, 1)).relu()
        return {"a": self.fc(hidden).view(*x.shape).sum(1), "b": hidden.view(len(x), -1)[:, 0]}


def test_capture_gives_each_sample_its_rows_and_counts_the_last_call():
    torch.manual_seed(0)
    model, x = Rows().requires_grad_(False), torch.randn(4, 5, 3)
    output, fields = capture(model, find_layer(model, "fc.weight"), forward, x)
    hidden = model.fc(x).relu()
    torch.testing.assert_close(fields["layer_input"], hidden)
    torch.testing.assert_close(fields["activation"], model.fc(hidden))
    torch.testing.assert_close(fields["base_output"], torch.cat([output["a"], output["b"].unsqueeze(1)], dim=1))


def test_capture_of_a_layer_that_is_not_called():
    model = Rows()
    with pytest.raises(TaskError, match=r"the module of never.weight is not called in the forward pass"):
        capture(model, find_layer(model, "never.weight"), forward, torch.randn(4, 5, 3))
    assert not model.never._forward_hooks


class Shared(nn.Module):
    """Three rows for all samples of a batch together."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x):
        return x + self.fc(x[:3]).sum(0)


def test_capture_of_rows_that_do_not_divide_into_samples():
    model = Shared()
    with pytest.raises(TaskError, match=r"the input of fc.weight has shape \(3, 3\) for a batch of 4"):
        capture(model, find_layer(model, "fc.weight"), forward, torch.randn(4, 3))
    assert not model.fc._forward_hooks


class Keyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x):
        return self.fc(input=x)


def test_capture_of_a_layer_called_by_keyword():
    model, x = Keyword().requires_grad_(False), torch.randn(4, 3)
    _, fields = capture(model, find_layer(model, "fc.weight"), forward, x)
    assert torch.equal(fields["layer_input"], x)
    assert torch.equal(fields["activation"], model.fc(x))


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x):
        hidden = x + 1
        output = self.fc(hidden)
        hidden += output
        return hidden


def test_the_activation_is_taken_before_a_nonlinearity_that_works_in_place():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True)).requires_grad_(False), torch.randn(5, 3)
    _, fields = capture(model, find_layer(model, "0.weight"), forward, x)
    torch.testing.assert_close(fields["activation"], F.linear(x, model[0].weight, model[0].bias))


def test_the_layer_input_is_taken_before_a_residual_sum_in_place():
    torch.manual_seed(0)
    model, x = InPlace().requires_grad_(False), torch.randn(4, 3)
    _, fields = capture(model, find_layer(model, "fc.weight"), forward, x)
    torch.testing.assert_close(fields["layer_input"], x + 1)


def not_reduced(name, value):
    return None


def test_wide_fields_of_a_convolution_are_pooled_over_the_picture():
    fields = {"layer_input": torch.randn(2, 8, 32, 32), "activation": torch.randn(2, 4, 32, 32)}
    found, notes = reduce_fields(fields, nn.Conv2d, not_reduced)
    torch.testing.assert_close(found["layer_input"], fields["layer_input"].mean((2, 3)))
    # 4,096 numbers exactly are not too wide.
    assert torch.equal(found["activation"], fields["activation"])
    assert notes == {"layer_input": "mean over axes [2, 3] of (8, 32, 32)"}


def test_wide_fields_of_other_layers_are_pooled_over_all_but_the_last_axis():
    fields = {"layer_input": torch.randn(2, 10, 7, 64), "activation": torch.randn(2, 10, 7, 5)}
    found, notes = reduce_fields(fields, nn.Linear, not_reduced)
    torch.testing.assert_close(found["layer_input"], fields["layer_input"].mean((1, 2)))
    assert torch.equal(found["activation"], fields["activation"])
    assert notes == {"layer_input": "mean over axes [1, 2] of (10, 7, 64)"}


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
