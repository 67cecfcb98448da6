"""Commands called from Python, without the command line."""

import pytest

from stages.evaluate import evaluate
from stages.foundation.errors import ArtifactError
from stages.lifecycle.results import command_of
from stages.run import run
from stages.run_directory.pipeline import ORDER
from stages.run_directory.project import load_project


@pytest.fixture
def opened(pytestconfig):
    """The project of a folder, on the device under test."""
    return lambda folder: load_project(folder.config, overrides=[f"run.device={pytestconfig.getoption('--device')}"])


@pytest.mark.parametrize("name", ORDER)
def test_every_stage_names_its_function(name):
    command = command_of(name)
    assert (command.__module__, command.__name__) == (f"stages.{name.replace('-', '_')}", name.replace("-", "_"))


def test_run_then_evaluate(project, opened):
    folder = project()
    mine = opened(folder)
    made = list(run(mine))
    assert [result.stage for result in made] == [name for name in ORDER if name != "evaluate"]
    assert not any(result.up_to_date for result in made)
    assert all(result.up_to_date for result in run(mine))
    result = evaluate(mine)
    assert result.summary["verdict"]
    assert folder.read("evaluate/results.json") == result.summary


def test_a_branch_of_another_seed_takes_no_command_line(project, opened):
    folder = project({"evaluate": {"seeds": 2, "resamples": 100}})
    mine = opened(folder)
    list(run(mine))
    assert sorted(evaluate(mine).summary["seeds"]["seeds"]) == [1, 2]


def test_what_is_missing_is_raised(project, opened):
    mine = opened(project())
    with pytest.raises(ArtifactError, match="collect needs stages that are not done"):
        list(run(mine, "collect"))
