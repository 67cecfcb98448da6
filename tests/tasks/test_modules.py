"""The user's modules: where they are found, under which names, how often, and what they see and leave."""

import sys

import pytest
import torch

from stages.foundation.errors import TaskError
from stages.foundation.torch_state import usual_torch
from stages.tasks.modules import load_object
from stages.tasks.user_code import user_code


@pytest.fixture
def write(tmp_path):
    def put(root="one", **files):
        folder = tmp_path / root
        folder.mkdir(exist_ok=True)
        for name, text in files.items():
            (folder / f"{name}.py").write_text(text)
        return folder

    return put


def load(root, spec):
    return load_object(root, spec, "task.model")


def test_modules_have_their_own_names_and_are_imported_once(write):
    root = write(
        first="import second\ncount = second.counted()\nname = __name__",
        second="seen = []\ndef counted():\n    seen.append(1)\n    return len(seen)",
    )
    assert load(root, "first:name") == "first"
    assert load(root, "first:count") == 1
    assert load(root, "second:seen") == [1]
    assert load(root, "second:counted")() == 2
    assert load(root, "first:count") == 1


def test_a_change_is_seen(write):
    root = write(other="value = 1", first="from other import value")
    assert load(root, "first:value") == 1
    write(other="value = 22", first="from other import value  # again")
    assert load(root, "first:value") == 22


def test_projects_do_not_meet(write):
    one, two = (
        write("one", first="from helper import value", helper="value = 1"),
        write("two", first="from helper import value", helper="value = 2"),
    )
    assert [load(root, "first:value") for root in (one, two, one)] == [1, 2, 1]


def test_a_project_inside_another_is_another(write):
    outer, inner = write("one", first="value = 1"), write("one/inner", first="value = 2")
    assert [load(root, "first:value") for root in (inner, outer, inner)] == [2, 1, 2]


def test_what_the_caller_has_imported_is_taken(write, monkeypatch):
    root = write("called", package_of_the_caller="value = [3]")
    monkeypatch.syspath_prepend(root)
    module = __import__("package_of_the_caller")
    assert load(root, "package_of_the_caller:value") is module.value
    del sys.modules["package_of_the_caller"]


def test_a_folder_is_first_while_importing_and_last_afterwards(write):
    """The first wins inside, and takes nobody else's place later."""
    root = write(
        first="import sys\nplace, words = sys.path[0], list(sys.argv)\ndef late():\n    import other\n    return other.value",
        other="value = 3",
    )
    before = list(sys.argv)
    assert load(root, "first:place") == str(root)
    assert load(root, "first:words") == [str(root / "first.py")]
    assert load(root, "first:late")() == 3
    assert sys.path[-1] == str(root)
    assert sys.path.count(str(root)) == 1
    assert sys.argv == before


@pytest.mark.parametrize("name", ["zarr", "queue", "numpy"])
def test_a_file_named_like_a_library_is_the_users_and_hijacks_nothing(write, name):
    library = sys.modules.get(name) or __import__(name)
    root = write(**{name: "value = 4"})
    assert load(root, f"{name}:value") == 4
    assert sys.modules[name] is library


def test_what_fails_to_import_can_be_mended(write):
    root = write(first="import broken", broken="1 / 0")
    with pytest.raises(TaskError, match="ZeroDivisionError"):
        load(root, "first:value")
    write(first="from broken import value", broken="value = 5")
    assert load(root, "first:value") == 5


def test_exits_and_options_are_no_end(write):
    with pytest.raises(TaskError, match="SystemExit"):
        load(write(first="import sys\nsys.exit(3)"), "first:value")


# torch's global state


def test_what_an_import_changes_holds_for_the_users_code_alone(write):
    root = write(
        first="import torch\ntorch.set_default_dtype(torch.float64)\ntorch.set_grad_enabled(False)\n"
        "torch.autograd.set_detect_anomaly(True)\ntorch.use_deterministic_algorithms(True)\nvalue = 1"
    )
    with usual_torch():
        load(root, "first:value")
        assert torch.zeros(1).dtype == torch.float32
        assert torch.is_grad_enabled()
        assert not torch.is_anomaly_enabled()
        assert not torch.are_deterministic_algorithms_enabled()
        with user_code("model()"):
            assert torch.zeros(1).dtype == torch.float64
        with torch.no_grad(), user_code("forward"):
            torch.set_grad_enabled(True)
        assert torch.zeros(1).dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32


def test_what_the_caller_has_set_is_put_back():
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with torch.no_grad(), torch.autograd.set_detect_anomaly(True):
            with usual_torch():
                assert torch.zeros(1).dtype == torch.float32
                assert torch.zeros(1).device.type == "cpu"
                assert torch.is_grad_enabled()
                assert not torch.is_anomaly_enabled()
                with user_code("model()"):
                    assert (torch.zeros(1).dtype, torch.zeros(1).device.type) == (torch.float64, "meta")
                assert torch.zeros(1).device.type == "cpu"
            assert not torch.is_grad_enabled()
            assert torch.is_anomaly_enabled()
        assert (torch.zeros(1).dtype, torch.zeros(1).device.type) == (torch.float64, "meta")
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
        torch.use_deterministic_algorithms(False)
