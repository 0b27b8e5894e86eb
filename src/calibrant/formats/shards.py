"""Safetensors written part by part, then joined into one file or shards without being loaded again."""

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from calibrant.formats.safetensors_file import element_bytes

# The default shard size of save_pretrained in transformers 5.
SHARD_BYTES = 50 * 10**9
_COPY_BYTES = 16 << 20


@dataclass(frozen=True)
class _Stored:
    part: Path
    dtype: str
    shape: list[int]
    begin: int
    size: int


class ShardWriter:
    """Writes parts to ``folder``; ``finish`` joins them.

    Args:
        folder: the folder of the parts and of the result.
        metadata: strings for the header of every resulting file.
        shard_bytes: limit of tensor bytes per file; only a file of one larger tensor exceeds it.
    """

    def __init__(self, folder: Path, metadata: dict[str, str], shard_bytes: int = SHARD_BYTES) -> None:
        self._folder, self._metadata, self._shard_bytes = folder, metadata, shard_bytes
        self._stored: dict[str, _Stored] = {}

    def write_part(self, tensors: dict[str, torch.Tensor]) -> None:
        """Write ``tensors`` to disk as one part."""
        self._folder.mkdir(exist_ok=True)
        part = self._folder / f"part-{len({s.part for s in self._stored.values()}):05d}.safetensors"
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, part)
        with part.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            self._stored[name] = _Stored(part, entry["dtype"], entry["shape"], 8 + length + begin, end - begin)

    def finish(self) -> list[Path]:
        """Join the parts into ``model.safetensors``, or shards with an index, and remove the parts.

        Tensors are distributed in the order of their names. Returns the written files, none if there is no part.
        """
        if not self._stored:
            return []
        shards = self._plan()
        if len(shards) == 1:
            names = ["model.safetensors"]
        else:
            names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
            self._write_index(dict(zip(names, shards, strict=True)))
        for name, tensors in zip(names, shards, strict=True):
            self._join(self._folder / name, tensors)
        for part in {stored.part for stored in self._stored.values()}:
            part.unlink()
        return [self._folder / name for name in names]

    def _plan(self) -> list[list[str]]:
        shards: list[list[str]] = [[]]
        filled = 0
        for name in sorted(self._stored):
            size = self._stored[name].size
            if shards[-1] and filled + size > self._shard_bytes:
                shards.append([])
                filled = 0
            shards[-1].append(name)
            filled += size
        return shards

    def _write_index(self, shards: dict[str, list[str]]) -> None:
        index = {
            "metadata": {"total_size": sum(stored.size for stored in self._stored.values())},
            "weight_map": {name: file for file, names in shards.items() for name in names},
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (self._folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")

    def _join(self, target: Path, names: list[str]) -> None:
        header: dict[str, Any] = {"__metadata__": self._metadata}
        position = 0
        # Wider types first keep every tensor aligned, as in files of the safetensors library.
        order = sorted(names, key=lambda name: (-element_bytes(self._stored[name].dtype), name))
        for name in order:
            stored = self._stored[name]
            header[name] = {
                "dtype": stored.dtype,
                "shape": stored.shape,
                "data_offsets": [position, position + stored.size],
            }
            position += stored.size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with target.open("wb") as output:
            output.write(struct.pack("<Q", len(text)) + text)
            for name in order:
                _copy(self._stored[name], output)


def _copy(stored: _Stored, output: Any) -> None:
    with stored.part.open("rb") as source:
        source.seek(stored.begin)
        remaining = stored.size
        while remaining:
            chunk = source.read(min(_COPY_BYTES, remaining))
            output.write(chunk)
            remaining -= len(chunk)
