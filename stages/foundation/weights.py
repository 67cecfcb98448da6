"""The files that trained weights lie in: one, or an index and its shards, or what a Hugging Face folder holds."""

import json
from pathlib import Path

from stages.foundation.errors import DataError

INDEX = ".index.json"
# In a folder, the first of these that is there.
IN_FOLDER = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "diffusion_pytorch_model.safetensors",
)
SETTING_HINT = "--weights or task.weights names it; relative paths in ocd.toml start at its folder"


def weight_files(path: Path) -> list[Path]:
    """The files to read: the one named, or that of a folder, and after an index its shards.

    Raises:
        DataError: a folder that holds none, an index that is none, or whose shards lie elsewhere or are missing.
    """
    if path.is_dir():
        found = next((path / name for name in IN_FOLDER if (path / name).is_file()), None)
        if found is None:
            raise DataError(f"{path} is a folder without weights", f"expected one of {', '.join(IN_FOLDER)} in it")
        path = found
    if not path.name.endswith(INDEX) or not path.is_file():
        return [path]
    try:
        names = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
        if not all(isinstance(name, str) and name == Path(name).name for name in names):
            raise ValueError(f"its shards are {names[:3]}, expected names of files beside it")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is no index of weights: {error}", 'expected {"weight_map": {"key": "file", …}}') from error
    shards = [path.parent / name for name in names]
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise DataError(f"{path} names {missing[0]}, which is missing", "put all shards beside their index")
    return [path, *shards]
