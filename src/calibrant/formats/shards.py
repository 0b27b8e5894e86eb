"""Safetensors written part by part; parts become one file, or shards of a larger model, without being loaded again."""

import json
import os
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from calibrant.formats.safetensors_file import element_bytes, stored_tensors
from calibrant.output_folder import sync

# Parts are joined into one file up to this size; larger ones are themselves the shards, written once only (ours).
SHARD_BYTES = 5 * 10**9
_COPY_BYTES = 16 << 20


@dataclass(frozen=True)
class _Stored:
    part: Path
    dtype: str
    shape: list[int]
    begin: int
    size: int


class ShardWriter:
    """Writes parts to the folder ``parts``; ``finish`` makes files of them in another folder.

    Args:
        parts: the folder of the parts, made by the first one.
        metadata: strings for the header of every resulting file.
        shard_bytes: most tensor bytes that are joined into one file.
    """

    def __init__(self, parts: Path, metadata: dict[str, str], shard_bytes: int = SHARD_BYTES) -> None:
        self._parts, self._metadata, self._shard_bytes = parts, metadata, shard_bytes
        self._stored: dict[str, _Stored] = {}
        self._files: list[Path] = []
        self._synced = 0

    def write_part(self, tensors: dict[str, torch.Tensor]) -> None:
        """Write ``tensors`` to disk as one part."""
        self._parts.mkdir(parents=True, exist_ok=True)
        part = self._part(len(self._files))
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, part, self._metadata)
        self._add(part)

    @property
    def places(self) -> dict[str, Path]:
        """The part of every tensor."""
        return {name: stored.part for name, stored in self._stored.items()}

    def sync(self) -> int:
        """Wait until all parts are on the disk; returns their number."""
        for part in self._files[self._synced :]:
            sync(part)
        if self._files:
            sync(self._parts)
        self._synced = len(self._files)
        return self._synced

    def resume(self, count: int) -> None:
        """Go on after the first ``count`` parts that are there; others are removed.

        Raises:
            OSError, ValueError: a part is missing or damaged.
        """
        for number in range(count):
            self._add(self._part(number))
        self._synced = count
        for part in self._parts.glob("part-*.safetensors"):
            if part not in self._files:
                part.unlink()

    def _part(self, number: int) -> Path:
        return self._parts / f"part-{number:05d}.safetensors"

    def _add(self, part: Path) -> None:
        found = stored_tensors(part)
        if not found or part.stat().st_size != max(one.end for one in found.values()):
            raise ValueError(f"{part.name} has lost bytes")
        self._files.append(part)
        for name, one in found.items():
            self._stored[name] = _Stored(part, one.dtype, one.shape, one.begin, one.end - one.begin)

    def finish(self, folder: Path) -> list[Path]:
        """Make ``model.safetensors`` of the parts in ``folder``, or shards with an index; the parts stay.

        Returns the written files, none if there is no part.
        """
        if not self._stored:
            return []
        folder.mkdir(exist_ok=True)
        if sum(stored.size for stored in self._stored.values()) <= self._shard_bytes:
            self._join(folder / "model.safetensors", sorted(self._stored))
            return [folder / "model.safetensors"]
        count = len(self._files)
        names = {part: f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i, part in enumerate(self._files)}
        for part, name in names.items():
            _link(part, folder / name)
        self._write_index(folder, {name: names[stored.part] for name, stored in self._stored.items()})
        return [folder / name for name in names.values()]

    def _write_index(self, folder: Path, files: dict[str, str]) -> None:
        index = {
            "metadata": {"total_size": sum(stored.size for stored in self._stored.values())},
            "weight_map": files,
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")

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


def _link(source: Path, target: Path) -> None:
    """Give ``source`` the further name ``target``; a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
