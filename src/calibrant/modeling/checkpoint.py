"""Model folders on disk: configuration and safetensors files, checked before any weight is loaded."""

import os
from collections.abc import Iterable
from functools import cache, cached_property
from pathlib import Path

import torch
import transformers
from safetensors import safe_open

from calibrant.errors import CalibrantError
from calibrant.formats.input_rounding import INPUT_ROUNDING
from calibrant.formats.safetensors_file import stored_tensors
from calibrant.hashing import sha256_file, sha256_json
from calibrant.modeling.decoded_tensors import DecodedTensors, decoded_dtype
from calibrant.modeling.expert_tensors import SplitExperts
from calibrant.modeling.model_config import (
    CONFIG_FILE,
    LANGUAGE_MODELS,
    architecture,
    check_sizes,
    drop_quantization,
    parse_config,
    quantization_settings,
    read_config_dict,
    without_quantization,
)
from calibrant.modeling.weight_files import TensorInfo, find_weights


class ModelFolder:
    """A Hugging Face model folder with safetensors weights; opening it loads no weight.

    Args:
        path: the folder.
        allow_encoder: also accept architectures other than causal language models, such as BERT classifiers.
        allow_quantized: also accept quantized models.
        dequantize: take a quantized model for the dense one that it stands for; weights are decoded when they are read.

    Raises:
        CalibrantError: the folder, its configuration or a shard is missing, damaged or not supported.
    """

    def __init__(
        self,
        path: str | Path,
        allow_encoder: bool = False,
        allow_quantized: bool = False,
        dequantize: bool = False,
    ) -> None:
        self.path = Path(path)
        if self.path.is_file():
            raise CalibrantError(f"{self.path}: is a file; a model is a folder of config.json and safetensors weights")
        if not self.path.is_dir():
            raise CalibrantError(f"{self.path}: no such model folder (a model on the hub is written hub:owner/name)")
        self.config_dict = read_config_dict(self.path)
        self.architecture = architecture(self.path / CONFIG_FILE, self.config_dict, allow_encoder)
        self.quantization = quantization_settings(self.config_dict)
        self.quantized = self.quantization is not None or (self.path / INPUT_ROUNDING).exists()
        if self.quantized and not allow_quantized and not dequantize:
            raise CalibrantError(
                f"{self.path}: the model is quantized already; start from its original weights, or ask for it to be "
                "decoded (`dequantize`)"
            )
        weights = find_weights(self.path, self.config_dict.get("transformers_weights"))
        self.tensors, self.unread = weights.tensors, weights.unread
        self._files = weights.tensors
        check_sizes(self.path / CONFIG_FILE, self.config_dict, len(self.tensors))
        self.config = parse_config(self.path)
        self._decoded: DecodedTensors | None = None
        self._joined: dict[str, SplitExperts] = {}
        self._places = cache(stored_tensors)
        if dequantize:
            self._decode()

    def _decode(self) -> None:
        """Present the dense model.

        Raises:
            CalibrantError: the model is not quantized, or in a format that is not read here.
        """
        if self.quantization is None:
            raise CalibrantError(f"{self.path}: the model is not quantized, so there is nothing to decode")
        try:
            dtype = decoded_dtype(self.config_dict)
            self._decoded = DecodedTensors(self._files, self._read, self.quantization, dtype)
        except CalibrantError as error:
            raise CalibrantError(f"{self.path}: {error}") from error
        self.tensors, self.quantization, self.quantized = self._decoded.tensors, None, False
        self.config_dict = without_quantization(self.config_dict)
        drop_quantization(self.config)

    @property
    def decoded(self) -> bool:
        """Whether the folder's own weights are quantized, and decoded when they are read."""
        return self._decoded is not None

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
        return self.architecture in LANGUAGE_MODELS

    @property
    def vocabulary(self) -> int:
        """Number of token ids in the embedding."""
        return int(self.config.get_text_config().vocab_size)

    def read(self, name: str) -> torch.Tensor:
        """The tensor as stored, or decoded.

        Raises:
            CalibrantError: the file cannot be read.
        """
        if name in self._joined:
            return self._joined[name].joined(self.read)
        return self._read(name) if self._decoded is None else self._decoded.read(name)

    def prefetch(self, names: Iterable[str]) -> None:
        """Ask the system to read the tensors ``names`` into its cache, without waiting for them."""
        if not hasattr(os, "posix_fadvise"):
            return
        files: dict[Path, list[str]] = {}
        for name in names:
            if name in self._files:  # others are made of several tensors
                files.setdefault(self._files[name].file, []).append(name)
        for file, own in files.items():
            places = self._places(file)
            with file.open("rb") as opened:
                for name in own:
                    place = places[name]
                    os.posix_fadvise(opened.fileno(), place.begin, place.end - place.begin, os.POSIX_FADV_WILLNEED)

    def join(self, experts: SplitExperts) -> None:
        """Present the linears of ``experts`` as the fused parameter that they are parts of."""
        parts = set(experts.stored)
        first = self.tensors[experts.stored[0]]
        kept = {name: info for name, info in self.tensors.items() if name not in parts}
        self.tensors = {**kept, experts.parameter: TensorInfo(first.file, first.dtype, experts.shape)}
        self._joined[experts.parameter] = experts

    def _read(self, name: str) -> torch.Tensor:
        try:
            with safe_open(self._files[name].file, framework="pt") as file:
                tensor: torch.Tensor = file.get_tensor(name)
                return tensor
        except Exception as error:  # damaged files raise exceptions of several libraries
            raise CalibrantError(f"{self._files[name].file}: tensor {name} cannot be read ({error})") from error

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most stored numbers, in which scales and dense weights are written; float32 for float64.

        Raises:
            CalibrantError: that dtype is not float64, float32, bfloat16 or float16.
        """
        sizes: dict[str, int] = {}
        for info in self.tensors.values():
            sizes[info.dtype] = sizes.get(info.dtype, 0) + torch.Size(info.shape).numel()
        name = max(sorted(sizes), key=lambda dtype: sizes[dtype])
        known = {"F64": torch.float32, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
        if name not in known:
            example = next(tensor for tensor, info in self.tensors.items() if info.dtype == name)
            raise CalibrantError(
                f"{self.path}: {example} and most weights are stored as {name}; "
                "only F64, F32, BF16 and F16 can be compressed"
            )
        return known[name]

    @property
    def context_length(self) -> int | None:
        """The longest sequence that the configuration allows, in tokens; None if it sets no limit."""
        text = self.config.get_text_config()
        length = vars(text).get("max_position_embeddings", vars(text).get("n_positions"))
        return int(length) if isinstance(length, int) else None

    @cached_property
    def identity(self) -> dict[str, str]:
        """Architecture and SHA-256 hashes of configuration and weights, for manifests and reports."""
        files = sorted({info.file for info in self.tensors.values()})
        weights = sha256_json({file.name: sha256_file(file) for file in files})
        return {
            "architecture": self.architecture,
            "config_sha256": sha256_json(self.config_dict, allow_nan=True),
            "weights_sha256": weights,
        }


def model_class(architecture: str) -> type[transformers.PreTrainedModel]:
    """The class of transformers with the name ``architecture``."""
    found: type[transformers.PreTrainedModel] = vars(transformers).get(architecture) or getattr(
        transformers, architecture
    )
    return found
