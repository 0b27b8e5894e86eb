"""A model folder on disk: its configuration and its safetensors, checked before anything is loaded."""

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from calibrant.errors import CalibrantError
from calibrant.hashing import sha256_file, sha256_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_HEADER_LENGTH_BYTES = 8
_LARGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


class ModelFolder:
    """A Hugging Face model folder with safetensors weights, opened without loading a weight.

    Args:
        path: the folder.
        allow_encoder: also accept architectures that are not causal language models (BERT classifiers).

    Raises:
        CalibrantError: the folder, its configuration or one of its shards is missing, damaged or of a kind that
            cannot be compressed.
    """

    def __init__(self, path: str | Path, allow_encoder: bool = False) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise CalibrantError(f"{self.path}: no such model folder (a model on the hub is written hub:owner/name)")
        if not (self.path / "config.json").is_file():
            raise CalibrantError(f"{self.path}: not a model folder, config.json is missing")
        self.config_dict = _read_json(self.path / "config.json")
        self.config = _read_config(self.path)
        self.architecture = _architecture(self.path, self.config_dict, allow_encoder)
        if "quantization_config" in self.config_dict:
            raise CalibrantError(f"{self.path}: the model is quantized already; start from its original weights")
        self.tensors = _tensor_table(self.path)

    def read(self, name: str) -> torch.Tensor:
        """One tensor as it is stored."""
        try:
            with safe_open(self.tensors[name].file, framework="pt") as file:
                tensor: torch.Tensor = file.get_tensor(name)
                return tensor
        except (SafetensorError, OSError) as error:
            raise CalibrantError(f"{self.tensors[name].file}: tensor {name} cannot be read ({error})") from error

    @property
    def dtype(self) -> torch.dtype:
        """The dtype most of the stored elements have: what scales and dense weights are written in."""
        sizes: dict[str, int] = {}
        for info in self.tensors.values():
            sizes[info.dtype] = sizes.get(info.dtype, 0) + torch.Size(info.shape).numel()
        name = max(sorted(sizes), key=lambda dtype: sizes[dtype])
        known = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
        if name not in known:
            raise CalibrantError(f"{self.path}: weights stored as {name}; only F32, BF16 and F16 can be compressed")
        return known[name]

    @property
    def context_length(self) -> int | None:
        """The longest sequence the configuration promises, or None where it names none."""
        text = self.config.get_text_config()
        return int(text.max_position_embeddings) if hasattr(text, "max_position_embeddings") else None

    def identity(self) -> dict[str, str]:
        """Hashes of configuration and weights for manifests and reports; no paths."""
        files = sorted({info.file for info in self.tensors.values()})
        weights = sha256_json({file.name: sha256_file(file) for file in files})
        return {
            "architecture": self.architecture,
            "config_sha256": sha256_json(self.config_dict),
            "weights_sha256": weights,
        }


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CalibrantError(f"{path}: not readable JSON ({error})") from error
    if not isinstance(value, dict):
        raise CalibrantError(f"{path}: expected a JSON object")
    return value


def _read_config(path: Path) -> transformers.PretrainedConfig:
    try:
        config: transformers.PretrainedConfig = transformers.AutoConfig.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise CalibrantError(f"{path / 'config.json'}: {str(error).splitlines()[0]}") from error
    return config


def _architecture(path: Path, config: dict[str, Any], allow_encoder: bool) -> str:
    named = (config.get("architectures") or [""])[0]
    causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    if named in causal or (allow_encoder and hasattr(transformers, named or "-")):
        return str(named)
    raise CalibrantError(
        f"{path / 'config.json'}: architecture {named or 'not named'} is not a causal language model that transformers "
        f"{transformers.__version__} knows"
    )


def _tensor_table(path: Path) -> dict[str, TensorInfo]:
    """Names to places, from the index or the single file; every shard's size is checked against its header."""
    index = path / INDEX_FILE
    weight_map: dict[str, str] = {}
    if index.is_file():
        weight_map = _read_json(index).get("weight_map") or {}
        if not isinstance(weight_map, dict) or not weight_map:
            raise CalibrantError(f"{index}: no weight_map in it")
        names = sorted(set(weight_map.values()))
        for name in names:
            if Path(name).name != name:
                raise CalibrantError(f"{index}: shard name {name!r} leaves the folder")
            if not (path / name).is_file():
                raise CalibrantError(f"{path / name}: shard is missing, {INDEX_FILE} names it")
        files = [path / name for name in names]
    elif (path / SINGLE_FILE).is_file():
        files = [path / SINGLE_FILE]
    else:
        raise CalibrantError(f"{path}: no {SINGLE_FILE} in it; only safetensors weights are read")
    table: dict[str, TensorInfo] = {}
    for file in files:
        table.update(_shard_table(file))
    if set(weight_map) - set(table):
        missing = sorted(set(weight_map) - set(table))[0]
        raise CalibrantError(f"{index}: names tensor {missing}, which is in no shard")
    return table


def _shard_table(file: Path) -> dict[str, TensorInfo]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(_HEADER_LENGTH_BYTES)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == _HEADER_LENGTH_BYTES else _LARGEST_HEADER
        if _HEADER_LENGTH_BYTES + length > size or length >= _LARGEST_HEADER:
            raise CalibrantError(f"{file}: not a complete safetensors file; copy or download it again")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise CalibrantError(f"{file}: damaged safetensors header; copy or download it again") from error
    header.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if _HEADER_LENGTH_BYTES + length + end != size:
        raise CalibrantError(
            f"{file}: truncated or damaged, {size} bytes where its header promises "
            f"{_HEADER_LENGTH_BYTES + length + end}; copy or download it again"
        )
    return {name: TensorInfo(file, entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}
