"""Model folders on disk: configuration and safetensors files, checked before any weight is loaded."""

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from calibrant.errors import CalibrantError, first_line
from calibrant.formats.input_rounding import INPUT_ROUNDING
from calibrant.hashing import sha256_file, sha256_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_HEADER_LENGTH_BYTES = 8
_LARGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class TensorInfo:
    """File, dtype (as spelled in safetensors headers) and shape of a stored tensor."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


class ModelFolder:
    """A Hugging Face model folder with safetensors weights; opening it loads no weight.

    Args:
        path: the folder.
        allow_encoder: also accept architectures other than causal language models, such as BERT classifiers.
        allow_quantized: also accept quantized models.

    Raises:
        CalibrantError: the folder, its configuration or a shard is missing, damaged or not supported.
    """

    def __init__(self, path: str | Path, allow_encoder: bool = False, allow_quantized: bool = False) -> None:
        self.path = Path(path)
        if self.path.is_file():
            raise CalibrantError(f"{self.path}: is a file; a model is a folder of config.json and safetensors weights")
        if not self.path.is_dir():
            raise CalibrantError(f"{self.path}: no such model folder (a model on the hub is written hub:owner/name)")
        if not (self.path / "config.json").is_file():
            raise CalibrantError(f"{self.path}: not a model folder, config.json is missing")
        self.config_dict = _read_json(self.path / "config.json")
        self.config = _read_config(self.path)
        self.architecture = _architecture(self.path, self.config_dict, allow_encoder)
        quantized = "quantization_config" in self.config_dict or (self.path / INPUT_ROUNDING).exists()
        if quantized and not allow_quantized:
            raise CalibrantError(f"{self.path}: the model is quantized already; start from its original weights")
        self.tensors = _tensor_table(self.path)

    @property
    def name(self) -> str:
        """The folder's name; for a snapshot from the hub ``owner/name@revision``."""
        path = self.path.resolve()
        if path.parent.name == "snapshots":
            return path.parent.parent.name.removeprefix("models--").replace("--", "/") + "@" + path.name
        return path.name

    @property
    def causal(self) -> bool:
        """Whether the model is a causal language model, which can generate text."""
        return self.architecture in set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())

    @property
    def vocabulary(self) -> int:
        """Number of token ids in the embedding."""
        return int(self.config.get_text_config().vocab_size)

    def read(self, name: str) -> torch.Tensor:
        """The tensor as stored.

        Raises:
            CalibrantError: the file cannot be read.
        """
        try:
            with safe_open(self.tensors[name].file, framework="pt") as file:
                tensor: torch.Tensor = file.get_tensor(name)
                return tensor
        except (SafetensorError, OSError) as error:
            raise CalibrantError(f"{self.tensors[name].file}: tensor {name} cannot be read ({error})") from error

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most stored elements, in which scales and dense weights are written.

        Raises:
            CalibrantError: that dtype is not float32, bfloat16 or float16.
        """
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
        """The longest sequence that the configuration allows, in tokens; None if it sets no limit."""
        text = self.config.get_text_config()
        length = vars(text).get("max_position_embeddings", vars(text).get("n_positions"))
        return int(length) if isinstance(length, int) else None

    def identity(self) -> dict[str, str]:
        """Architecture and SHA-256 hashes of configuration and weights, for manifests and reports."""
        files = sorted({info.file for info in self.tensors.values()})
        weights = sha256_json({file.name: sha256_file(file) for file in files})
        return {
            "architecture": self.architecture,
            "config_sha256": sha256_json(self.config_dict),
            "weights_sha256": weights,
        }


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise CalibrantError(f"{path}: not readable JSON ({error})") from error
    if not isinstance(value, dict):
        raise CalibrantError(f"{path}: expected a JSON object")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number that JSON knows")


def _is_file_map(value: object) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(name, str) for name in value.values())


def _read_config(path: Path) -> transformers.PretrainedConfig:
    try:
        config: transformers.PretrainedConfig = transformers.AutoConfig.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # invalid values raise any exception in the configuration classes
        raise CalibrantError(f"{path / 'config.json'}: {first_line(error)}") from error
    return config


def _architecture(path: Path, config: dict[str, Any], allow_encoder: bool) -> str:
    listed = config.get("architectures")
    named = listed[0] if isinstance(listed, list) and listed and isinstance(listed[0], str) else ""
    if named in set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        return named
    known = getattr(transformers, named, None) if allow_encoder and named else None
    if isinstance(known, type) and issubclass(known, transformers.PreTrainedModel):
        return named
    raise CalibrantError(
        f"{path / 'config.json'}: architecture {named or 'not named'} is not a causal language model that transformers "
        f"{transformers.__version__} knows"
    )


def _tensor_table(path: Path) -> dict[str, TensorInfo]:
    """Stored tensors by name, from the index or the single file; each file's size must match its header."""
    index = path / INDEX_FILE
    weight_map: dict[str, str] = {}
    if index.is_file():
        weight_map = _read_json(index).get("weight_map", {})
        if not _is_file_map(weight_map):
            raise CalibrantError(f"{index}: no weight_map of tensor names to files in it")
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
        try:
            table.update(_shard_table(file))
        except (OSError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise CalibrantError(f"{file}: not a readable safetensors file ({first_line(error)})") from error
    if not table:
        raise CalibrantError(f"{path}: its safetensors files contain no tensor")
    if set(weight_map) - set(table):
        missing = sorted(set(weight_map) - set(table))[0]
        raise CalibrantError(f"{index}: names tensor {missing}, which is in no shard")
    return table


def _is_tensor_entry(entry: object) -> bool:
    """Whether an entry of a safetensors header has a dtype, a shape and offsets."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    numbers = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else [None]
    return all(type(number) is int and number >= 0 for number in numbers) and len(offsets or ()) == 2


def _shard_table(file: Path) -> dict[str, TensorInfo]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(_HEADER_LENGTH_BYTES)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == _HEADER_LENGTH_BYTES else _LARGEST_HEADER
        if _HEADER_LENGTH_BYTES + length > size or length >= _LARGEST_HEADER:
            raise CalibrantError(f"{file}: not a complete safetensors file; copy or download it again")
        try:
            header = json.loads(stream.read(length))
        except (ValueError, RecursionError) as error:
            raise CalibrantError(f"{file}: damaged safetensors header; copy or download it again") from error
    header.pop("__metadata__", None)
    wrong = next((name for name, entry in header.items() if not _is_tensor_entry(entry)), None)
    if wrong is not None:
        raise CalibrantError(f"{file}: damaged safetensors header at {first_line(wrong)}; copy or download it again")
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if _HEADER_LENGTH_BYTES + length + end != size:
        raise CalibrantError(
            f"{file}: truncated or damaged, {size} bytes where its header promises "
            f"{_HEADER_LENGTH_BYTES + length + end}; copy or download it again"
        )
    return {name: TensorInfo(file, entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}


def model_class(architecture: str) -> type[transformers.PreTrainedModel]:
    """The class of transformers with the name ``architecture``."""
    found: type[transformers.PreTrainedModel] = vars(transformers).get(architecture) or getattr(
        transformers, architecture
    )
    return found
