"""The safetensors files that transformers loads from a model folder, and the tensors stored in them."""

import os
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from calibrant.errors import CalibrantError, first_line
from calibrant.modeling.json_file import read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_INDEX_SUFFIX = ".index.json"
_LARGEST_INDEX_BYTES = 2**28
# Larger than any axis of a real tensor; PyTorch fails on axes near 2**63 even where the tensor is empty.
_LONGEST_AXIS = 2**40


@dataclass(frozen=True)
class TensorInfo:
    """File, dtype (as spelled in safetensors headers) and shape of a stored tensor."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class WeightFiles:
    """Stored tensors by name, and the weight files of the folder that transformers does not load."""

    tensors: dict[str, TensorInfo]
    unread: tuple[Path, ...]


def find_weights(folder: Path, chosen: object = None) -> WeightFiles:
    """Tensors of the files that transformers loads from ``folder``: one file before shards with an index.

    ``chosen`` is ``transformers_weights`` of ``config.json``: a file or an index to load instead.

    Raises:
        CalibrantError: there is no safetensors file, one is missing or damaged, or the index leaves the folder.
    """
    start = _start(folder, chosen)
    files = _shards(start) if start.name.endswith(_INDEX_SUFFIX) else [start]
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        tensors.update(_table(file))
    if not tensors:
        raise CalibrantError(f"{folder}: its safetensors files contain no tensor")
    unread = sorted(set(folder.glob("*.safetensors")) - set(files))
    return WeightFiles(tensors, tuple(unread))


def _start(folder: Path, chosen: object) -> Path:
    if chosen is not None:
        if not isinstance(chosen, str) or Path(chosen).name != chosen or not (folder / chosen).is_file():
            raise CalibrantError(
                f"{folder / 'config.json'}: transformers_weights is {chosen!r}, which is no file in the folder"
            )
        if not chosen.endswith((".safetensors", ".safetensors" + _INDEX_SUFFIX)):
            raise CalibrantError(f"{folder / chosen}: only safetensors weights are read")
        return folder / chosen
    for name in (SINGLE_FILE, INDEX_FILE):
        if (folder / name).is_file():
            return folder / name
    raise CalibrantError(f"{folder}: no {SINGLE_FILE} in it; only safetensors weights are read")


def _shards(path: Path) -> list[Path]:
    """The shards that an index names; as for transformers, what is in them counts, not where the index puts it."""
    weight_map = read_json(path, _LARGEST_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CalibrantError(f"{path}: no weight_map of tensor names to files in it")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise CalibrantError(f"{path}: shard name {name!r} leaves the folder")
        if not os.path.isfile(path.parent / name):  # noqa: PTH113  # Path.is_file raises on names that cannot be
            raise CalibrantError(f"{path.parent / name}: shard is missing, {path.name} names it")
    return [path.parent / name for name in names]


def _table(file: Path) -> dict[str, TensorInfo]:
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  # not a mapping
            table = {name: TensorInfo(file, one.get_dtype(), tuple(one.get_shape())) for name, one in slices.items()}
    except Exception as error:  # damaged headers raise exceptions of several libraries
        raise CalibrantError(
            f"{file}: damaged or not a complete safetensors file ({first_line(error)}); copy or download it again"
        ) from error
    wrong = next((name for name, info in table.items() if max(info.shape, default=0) > _LONGEST_AXIS), None)
    if wrong is not None:
        raise CalibrantError(f"{file}: tensor {wrong} has shape {table[wrong].shape}, which no memory can hold")
    return table
