"""The documents cannot drift: commands, settings, exit codes, examples and links of the README are checked against the code.

`python tests/test_docs.py` prints the settings table for pasting into README.md.
"""

import re
import tomllib
from pathlib import Path

import pytest

from ocd_cli.app import app
from stages.foundation.config import tables
from stages.run_directory.project import check_settings, toml_value

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [command.name for command in app.registered_commands]


def settings_table() -> str:
    """Every setting as a row of Markdown."""
    lines = ["| setting | default | class | meaning |", "|---|---|---|---|"]
    for name, table in tables().items():
        for key, info in table.model_fields.items():
            default = "" if info.default is None else f"`{toml_value(info.default)}`"
            kind = info.json_schema_extra["kind"]
            meaning = info.description.replace("|", "\\|")
            lines.append(f"| `{name}.{info.alias or key}` | {default} | {kind} | {meaning} |")
    return "\n".join(lines)


def test_every_setting_is_documented():
    assert settings_table() in README


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_documented(name):
    assert re.search(rf"^\| `ocd {name}[ `]", README, re.MULTILINE)


def code_lines():
    """Lines of the README's and the examples' shell blocks."""
    for path in (ROOT / "README.md", *sorted(ROOT.glob("examples/*/README.md"))):
        for block in re.findall(r"```(?:bash|sh)\n(.*?)```", path.read_text(), re.DOTALL):
            yield from (line.strip() for line in block.splitlines() if line.strip() and not line.startswith("#"))


def test_every_command_shown_exists(ocd):
    shown = [line.split() for line in code_lines() if line.startswith("ocd ")]
    assert shown
    help_of = {name: ocd(None, name, "--help").stdout for name in {words[1] for words in shown}}
    for words in shown:
        for option in [word.partition("=")[0] for word in words if word.startswith("--")]:
            assert option in help_of[words[1]], f"{' '.join(words)}: no {option}"
        for setting in [words[i + 1] for i, word in enumerate(words) if word == "--set"]:
            table, _, key = setting.partition("=")[0].partition(".")
            assert key in {info.alias or name for name, info in tables()[table].model_fields.items()}, setting


def test_every_script_shown_exists():
    scripts = [line.split()[1] for line in code_lines() if line.startswith("bash ")]
    assert {"examples/digits/run.sh", "tests/run.sh"} <= set(scripts)
    assert all((ROOT / script).is_file() for script in scripts)


def test_every_link_of_the_documents_leads_somewhere():
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("examples/*/README.md"))):
        for target in re.findall(r"\]\((?!http)([^)#]+)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_settings_shown_are_valid():
    blocks = [tomllib.loads(block) for block in re.findall(r"```toml\n(.*?)```", README, re.DOTALL)]
    assert blocks
    for block in blocks:
        check_settings(block, "README.md")


@pytest.mark.parametrize("folder", sorted(path.parent.name for path in ROOT.glob("examples/*/ocd.toml")))
def test_every_example_has_its_files_and_valid_settings(folder):
    place = ROOT / "examples" / folder
    assert (place / "README.md").is_file()
    assert (place / "run.sh").is_file()
    check_settings(tomllib.loads((place / "ocd.toml").read_text()), folder)


def test_the_changelog_names_the_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_package_is_not_a_strangers():
    """`ocd` on the package index is another project's: what is installed is called torch-ocd."""
    for path in (path for kind in ("py", "md", "toml", "sh") for path in ROOT.rglob(f"*.{kind}") if ".venv" not in path.parts):
        wrong = re.findall(r"pip install (?:-\S+ )*[\"']?ocd\b", path.read_text())
        assert not wrong, f"{path}: {wrong}"
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["name"] == "torch-ocd"


if __name__ == "__main__":
    print(settings_table())
