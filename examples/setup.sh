# Sourced by the run scripts: makes .venv at the repository root and installs the project with the extras named in "$1".
# Safe to repeat: what is installed already is left alone, unless pyproject.toml or constraints.txt changed since.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
stamp="$root/.venv/installed-$1"
if [ ! -x "$root/.venv/bin/python" ]; then
    python3 -m venv "$root/.venv"
fi
if [ ! -e "$stamp" ] || [ "$root/pyproject.toml" -nt "$stamp" ] || [ "$root/constraints.txt" -nt "$stamp" ]; then
    echo "installing into $root/.venv" >&2
    # torch first and by its exact version, so that a build of it that pip is told of (a CPU one, say) is taken as it is.
    "$root/.venv/bin/python" -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' "$root/constraints.txt")" >&2
    "$root/.venv/bin/python" -m pip install --quiet --disable-pip-version-check -c "$root/constraints.txt" -e "$root[$1]" >&2
    touch "$stamp"
fi
PATH="$root/.venv/bin:$PATH"

# All stages of the example in this folder, then its evaluation. `--seeds N` and `--add ROW` are for the evaluation alone, other
# arguments for both.
run_example() {
    local both=() own=()
    while [ $# -gt 0 ]; do
        case "$1" in
        --seeds | --add)
            own+=("$1" "$2")
            shift
            ;;
        *) both+=("$1") ;;
        esac
        shift
    done
    # An empty array counts as unset in older shells.
    ocd run ${both[@]+"${both[@]}"}
    ocd evaluate ${both[@]+"${both[@]}"} ${own[@]+"${own[@]}"}
}
