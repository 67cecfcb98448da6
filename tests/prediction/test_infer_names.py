"""Answers for files are named by the stem: one does not give way to another file's without being told."""

import pytest
from folders import arrays
from processes import stopped_at

from stages.store.predictions import PredictionBlocks


@pytest.fixture
def two(finished):
    """Two files of one stem with different content."""
    for place in ("a", "b"):
        (finished.root / place).mkdir()
    return [finished.save(f"{place}/new.npz", arrays(6, seed)[0]) for place, seed in (("a", 3), ("b", 4))]


def refused(ocd, folder, first, second, *args):
    before = folder.files()
    result = ocd(folder, "infer", "--quiet", "--input", second, *args, code=3)
    assert result.stderr == (
        f"error: infer/new holds the predictions for {first}, and would hold those for {second}: "
        "they are named after the file, without its folder\n"
        "  rename one of the files to keep both, or replace the old ones: the same command with --force\n"
    )
    assert folder.files() == before


@pytest.mark.parametrize(
    "words", [[], ["--dry-run"], ["--ensemble", 1], ["--part", "1/1"]], ids=lambda words: " ".join(map(str, words))
)
def test_another_file_of_the_same_stem(finished, ocd, two, words):
    ocd(finished, "infer", "--input", two[0])
    refused(ocd, finished, *two, *words)
    ocd(finished, "infer", "--input", two[1], "--force")
    refused(ocd, finished, *reversed(two))


def test_while_the_answer_is_unfinished(finished, ocd, two):
    with stopped_at(0, kind=PredictionBlocks):
        ocd(finished, "infer", "--input", two[0], code=4)
    refused(ocd, finished, *two)
    ocd(finished, "infer", "--input", two[0])


def test_the_same_file_with_other_content_and_other_files_with_the_same(finished, ocd, two, monkeypatch):
    first = ocd.json(finished, "infer", "--input", two[0])
    two[1].write_bytes(two[0].read_bytes())
    assert ocd.json(finished, "infer", "--input", two[1]) == first
    finished.save("a/new.npz", arrays(7, 5)[0])
    monkeypatch.chdir(finished.root / "a")
    assert ocd.json(finished, "infer", "--input", "new.npz")["inputs"] == 7


def test_an_answer_that_does_not_say_of_which_file_it_is(finished, ocd, two):
    """As they were before that was recorded."""
    ocd(finished, "infer", "--input", two[0])
    path = finished.run / "infer" / "new" / "manifest.json"
    path.write_text(path.read_text().replace('"input":', '"output":'))
    ocd(finished, "infer", "--input", two[1])
