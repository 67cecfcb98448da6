"""What counts as a change of the user's code."""

import pytest

from stages.foundation.errors import TaskError
from stages.run_directory.sources import hash_code

LAYOUT = [
    ("net = (1,\n       2)\n", "\ufeffnet = (1, 2)  # two\n"),
    ('x = "a"\n', "x = 'a'\r\n"),
    ("def f():\n  return 1\n", "def f():\n\n    return 1"),
]
CONTENT = [('x = """a\n\nb"""', 'x = """a\nb"""'), ("x = '# a'", "x = '#'"), ("x = 1", "x = 1.0")]


@pytest.mark.parametrize(("source", "other"), [*LAYOUT, *CONTENT])
def test_what_code_says_is_hashed_and_not_its_layout(tmp_path, source, other):
    path, again = tmp_path / "one.py", tmp_path / "other.py"
    path.write_text(source)
    again.write_bytes(other.encode())
    assert (hash_code(path) == hash_code(again)) == ((source, other) in LAYOUT)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"x = 1\nx = = 2\n", ", line 2: invalid syntax"),
        (b"x = '\xff'\n", ", line "),
        (b"x = 1\0\n", "null byte"),
        (b"# coding: nothing\n", "unknown encoding"),
    ],
)
def test_code_that_is_not_python(tmp_path, content, says):
    (tmp_path / "bad.py").write_bytes(content)
    with pytest.raises(TaskError, match=r"bad\.py is not valid Python") as error:
        hash_code(tmp_path / "bad.py")
    assert says in error.value.message
