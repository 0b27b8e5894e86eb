"""One safetensors file, readable by whom the umask says."""

import json
import shutil
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

_ELEMENT_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


@dataclass(frozen=True)
class StoredTensor:
    """Dtype (as headers spell it), shape, and where the bytes begin and end in the file."""

    dtype: str
    shape: list[int]
    begin: int
    end: int


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of ``path`` by name, from its header.

    Raises:
        OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError: the file is damaged.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if 8 + length > path.stat().st_size:
            raise ValueError(f"{path.name} has lost bytes")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        if not isinstance(begin, int) or not isinstance(end, int):
            raise ValueError(f"{name} has no place in the file")
        found[name] = StoredTensor(entry["dtype"], entry["shape"], 8 + length + begin, 8 + length + end)
    return found


def element_bytes(dtype: str) -> int:
    """Bytes of a number of ``dtype``, as headers of safetensors spell it."""
    return _ELEMENT_BYTES.get(dtype, 1)


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write ``tensors`` to ``path`` with the permissions of any new file; a file that is there is replaced.

    Tensors are brought to the CPU and into row-major order. ``metadata`` are strings for the header.

    Raises:
        OSError, safetensors.SafetensorError: the file cannot be written.
    """
    path.unlink(missing_ok=True)
    path.touch()
    permissions = stat.S_IMODE(path.stat().st_mode)
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path, metadata)
    # safetensors 0.8 makes its files readable by their owner alone.
    if stat.S_IMODE(path.stat().st_mode) != permissions:
        path.chmod(permissions)


def replace_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Put ``tensors`` into ``path`` in place of those with their names, dtypes and shapes; other names keep theirs.

    A file with several names on the disk is replaced by a changed copy, so that the other names still show what it was.

    Raises:
        OSError: the file cannot be read or written.
    """
    places, changed = stored_tensors(path), path
    if path.stat().st_nlink > 1:
        changed = path.with_name(f"{path.name}.changed")
        shutil.copyfile(path, changed)
    with changed.open("r+b") as file:
        for name, tensor in tensors.items():
            raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            place = places[name]
            assert len(raw) == place.end - place.begin, name
            file.seek(place.begin)
            file.write(raw)
    changed.replace(path)
