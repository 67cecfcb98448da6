"""A setting that a flag gave once and that is forgotten later: the message says with which flags everything is kept."""

import shlex

import pytest
from expectations import ALL_DONE, from_on
from folders import put, states, status
from processes import stopped_at

from stages.run_directory.project import override_of, parse_override

VALUES = [
    *(0.002, 1e-05, 1e20, 3, 0, -2, True, False, [0.0, 0.5], [1, 2, 2], ["a b", "true"], [], {"width": 5, "of": ["x"]}, {}),
    *(
        "sgd",
        "mymodel:net",
        "all",
        "true",
        "1",
        "1e3",
        "nan",
        "",
        " x ",
        "it's",
        'a "b"',
        "a\\b",
        "2020-01-01",
        "a\nb",
        "[1]",
        "é𝄞",
    ),
]


def kept_by(result):
    """The words between "repeat" and ", or write", as a shell reads them."""
    return shlex.split(result.stderr.partition("repeat ")[2].rpartition(", or write")[0])


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_a_value_is_read_back_from_its_text(value):
    text = override_of("task.args", value)
    assert parse_override(*shlex.split(shlex.quote(text))) == ("task.args", value)
    assert type(parse_override(text)[1]) is type(value)


def test_what_is_not_set_has_no_text():
    assert override_of("task.kind", None) is None


def test_a_stage_is_kept_by_the_flags_that_made_it(project, ocd):
    folder = project(until="select-layer")
    given, now = (
        "--set collect.lr=0.05 --set collect.optimizer=sgd --set collect.skip_bad=true",
        "--set collect.lr=0.01 --set collect.optimizer=adam --set collect.skip_bad=false",
    )
    ocd(folder, "collect", *given.split())
    result = ocd(folder, "collect", code=3)
    hint = f"  to keep it, repeat {given}, or write them into ocd.toml; to redo it: ocd collect {now} --force\n"
    assert hint in result.stderr
    assert "up to date" in ocd(folder, "collect", *kept_by(result)).stdout
    # One that needs it says so, too.
    result = ocd(folder, "train-scale", code=3)
    assert hint in result.stderr
    ocd(folder, "train-scale", *kept_by(result))


def test_several_stages_name_each_setting_once(finished, ocd):
    ocd(finished, "run", "--force", *put("run.seed=3", "task.model_args={width = 5}", "collect.lr=0.02", "train-scale.width=9"))
    result = ocd(finished, "infer", code=3)
    assert (
        "  to keep them, repeat --set run.seed=3 --set 'task.model_args={width = 5}' --set collect.lr=0.02 --set "
        "train-scale.width=9, or write them into ocd.toml; to redo them: ocd train-base"
    ) in result.stderr
    assert set(states(ocd, finished, *kept_by(result)[1::2]).values()) == {"done"}


def test_unfinished_work_goes_on_with_the_flags_it_was_begun_with(project, ocd):
    folder = project({"collect": {"block_samples": 4}}, until="select-layer")
    with stopped_at(5):
        ocd(folder, "collect", "--set", "collect.lr=0.02", code=4)
    result = ocd(folder, "collect", "--set", "collect.samples=8", code=3)
    assert kept_by(result) == put("collect.lr=0.02", "collect.samples=all")
    assert "continues: 20 of 36 samples" in ocd(folder, "collect", *kept_by(result)).stderr


def test_an_extent_that_was_larger(finished, ocd):
    result = ocd(finished, "train-scale", "--set", "train-scale.max_steps=20", code=3)
    assert "  to keep it, repeat --set train-scale.max_steps=40, or write it into ocd.toml; to redo it: ocd train-scale " in (
        result.stderr
    )
    assert "up to date" in ocd(finished, "train-scale", *kept_by(result)).stdout


def test_no_flag_brings_back_the_content_of_a_file(finished, ocd):
    finished.edit("mymodel.py", "Tanh", "ReLU")
    changed = put("train-base.lr=0.5")
    result = ocd(finished, "train-base", *changed, code=3)
    assert "  to redo it: ocd train-base --set train-base.lr=0.5 --force; to keep it, set back what changed\n" in result.stderr
    assert "\n  run: ocd train-base --set train-base.lr=0.5 --force && " in ocd(finished, "collect", *changed, code=3).stderr


def test_deltas_can_be_kept_where_the_denoiser_is_of_older_ones(finished, ocd):
    ocd(finished, "collect", "--force", "--quiet", *put("collect.lr=0.05"))
    hint = "\n  to keep collect, repeat --set collect.lr=0.05, or write it into ocd.toml; to redo them: ocd collect "
    assert hint in ocd(finished, "evaluate", code=3).stderr


# A layer that was named


@pytest.fixture
def named(finished, ocd):
    """A finished run, and how its layer by the scores and another are called; the other was named by a flag."""
    chosen = finished.read("select-layer/layer.json")["layer"]
    (other,) = {"0.weight", "2.weight"} - {chosen}
    ocd(finished, "run", "--force", "--from", "select-layer", *put(f"select-layer.layer={other}"))
    return finished, chosen, other


def test_a_layer_that_was_named_is_not_what_auto_asks_for(named, ocd):
    folder, chosen, other = named
    what = f"select-layer.layer was '{other}', is now 'auto' (by the scores {chosen})"
    entry = status(ocd, folder)["select-layer"]
    assert (entry["state"], entry["detail"]) == ("stale", what)
    assert states(ocd, folder) == from_on("select-layer", "stale")
    hint = (
        f"\n  to keep it, repeat --set select-layer.layer={other}, or write it into ocd.toml; "
        "to redo it: ocd select-layer --set select-layer.layer=auto --force\n"
    )
    result = ocd(folder, "select-layer", code=3)
    assert f"error: select-layer is stale: {what}{hint}" in result.stderr
    assert f"  select-layer is stale: {what}{hint}" in ocd(folder, "collect", code=3).stderr
    # Kept by the flag, or by the file; by another name, another wish.
    assert states(ocd, folder, f"select-layer.layer={other}") == ALL_DONE
    assert states(ocd, folder, f"select-layer.layer={chosen}") == from_on("select-layer", "stale")
    folder.write({"select-layer": {"layer": other}})
    assert states(ocd, folder) == ALL_DONE
    folder.write({})
    assert ocd.json(folder, "select-layer", "--force")["chosen_by"] == "score"
    assert states(ocd, folder)["select-layer"] == "done"


def test_a_layer_that_was_named_and_that_the_scores_choose_too_stays(finished, ocd):
    chosen = finished.read("select-layer/layer.json")["layer"]
    ocd(finished, "select-layer", "--force", "--layer", chosen)
    assert finished.summary("select-layer")["chosen_by"] == "setting"
    assert states(ocd, finished) == ALL_DONE


def test_without_scores_nothing_is_said_of_them(project, ocd):
    folder = project(until="train-base")
    ocd(folder, "select-layer", "--layer", "0.weight", *put("select-layer.draws=0"))
    assert status(ocd, folder)["select-layer"]["detail"] == (
        "select-layer.draws was 0, is now 50; select-layer.layer was '0.weight', is now 'auto'"
    )
    kept = put("select-layer.draws=0", "select-layer.layer=0.weight")
    assert kept_by(ocd(folder, "collect", code=3)) == kept
    assert ocd.json(folder, "collect", *kept)["layer"] == "0.weight"
