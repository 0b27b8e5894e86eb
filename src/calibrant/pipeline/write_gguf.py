"""Writes a finished model as one GGUF file, which llama.cpp runs."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from calibrant.errors import CalibrantError
from calibrant.formats.gguf_architectures import (
    gguf_architecture,
    gguf_metadata,
    norm_offset,
    rotary_factors,
    row_order,
)
from calibrant.formats.gguf_blocks import GgufBlocks, block_type, pack_blocks
from calibrant.formats.gguf_names import GgufNames, gguf_library, gguf_names
from calibrant.formats.gguf_types import GGUF_TYPES
from calibrant.formats.gguf_vocabulary import GgufVocabulary, gguf_vocabulary
from calibrant.formats.kv_cache import cache_scales, kv_cache_layout
from calibrant.formats.quantized import FLOAT_TYPES, Codes
from calibrant.formats.stored_codes import quantized_linears, stored_codes, stored_format, stored_layout
from calibrant.hashing import sha256_bytes
from calibrant.modeling.checkpoint import ModelFolder
from calibrant.modeling.tokenizer import Tokenizer
from calibrant.pipeline.record import RECORD_NAME, RunRecord
from calibrant.progress import Progress
from calibrant.quantization.grid_fitting import fit_grid
from calibrant.quantization.grids import encode
from calibrant.recipes.gguf_spec import gguf_spec

EmbeddingType = Literal["Q8_0", "Q6_K", "Q5_0", "Q4_K", "Q4_0", "stored"]
# The file in outputs of the gguf format.
GGUF_NAME = "model.gguf"
# Buffers that older checkpoints store; llama.cpp computes them.
_COMPUTED = (".rotary_emb.inv_freq",)
# llama.cpp's numbers for what most weights of a file are (``llama_ftype``).
_FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 11, "Q4_K": 14,
    "Q5_K": 16, "Q6_K": 18, "BF16": 32,
}  # fmt: skip
_EMBEDDINGS = ("token_embd.weight", "output.weight")


@dataclass(frozen=True)
class GgufFile:
    """A written GGUF file: its ``architecture`` in llama.cpp, tensors by type, and bytes."""

    architecture: str
    types: dict[str, int]
    bytes: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Tensor:
    """A tensor to write: its name and type there, its shape, and how its bytes are made when its turn comes."""

    name: str
    kind: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]


def check_gguf(folder: ModelFolder) -> None:
    """Check, before any work, that the model in ``folder`` can be written as a GGUF file.

    Raises:
        CalibrantError: the extra ``gguf`` is not installed, or llama.cpp cannot hold the model or its tokenizer.
    """
    gguf_library()
    config = folder.config.get_text_config()
    try:
        gguf_metadata(config)
        gguf_vocabulary(Tokenizer(folder.path).hf, folder.vocabulary)
        _names(config, {name.rpartition(".")[0] for name in folder.tensors if not _is_left_out(config, name)})
    except CalibrantError as error:
        raise CalibrantError(f"{folder.path}: {error}") from error


def _is_left_out(config: Any, name: str) -> bool:
    """Whether llama.cpp computes the tensor, or takes the embedding for it."""
    tied = bool(config.tie_word_embeddings) and name == "lm_head.weight"
    return tied or name.endswith(_COMPUTED)


def _names(config: Any, bases: set[str]) -> GgufNames:
    """llama.cpp's names of the modules ``bases``.

    Raises:
        CalibrantError: one has none.
    """
    named = gguf_names(config, config.num_hidden_layers, {base: f"{base}.weight" for base in sorted(bases)})
    if named.left_out:
        raise CalibrantError(f"{named.left_out[0]}: llama.cpp's {named.architecture} has no such tensor")
    return named


class GgufExport:
    """A finished model, checked before anything is written.

    Args:
        folder: the model.
        embeddings: the type of embeddings and output matrix.
        progress: receives the progress, of the check too: it reads all codes.

    Raises:
        CalibrantError: llama.cpp cannot hold the model, as far as is known here; the message names what.
    """

    def __init__(self, folder: ModelFolder, embeddings: EmbeddingType, progress: Progress) -> None:
        if embeddings not in get_args(EmbeddingType):
            known = ", ".join(get_args(EmbeddingType))
            raise CalibrantError(f"{embeddings}: no such type of embeddings; there are {known}")
        gguf_library()
        self._folder, self._embeddings, self._progress = folder, embeddings, progress
        self._config = folder.config.get_text_config()
        try:
            self.architecture, self._metadata = gguf_architecture(self._config), gguf_metadata(self._config)
            self._tokenizer = Tokenizer(folder.path)
            self._vocabulary = gguf_vocabulary(self._tokenizer.hf, folder.vocabulary)
            self._tensors = self._planned()
        except CalibrantError as error:
            raise CalibrantError(f"{folder.path}: {error}") from error

    def write(self, target: Path) -> GgufFile:
        """Write the file and read it back.

        Raises:
            CalibrantError: a tensor cannot be read, or the file differs from what was written.
        """
        gguf = gguf_library()
        writer = gguf.GGUFWriter(target, self.architecture)
        self._describe(writer)
        for tensor in self._tensors:
            kind = gguf.GGMLQuantizationType[tensor.kind]
            size = gguf.quant_shape_to_byte_shape(tensor.shape, kind)
            writer.add_tensor_info(tensor.name, size, np.dtype(np.uint8), math.prod(size), kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        hashes = {}
        with self._progress.task("writing", len(self._tensors), "tensors") as task:
            for tensor in self._tensors:
                data = tensor.make()
                hashes[tensor.name] = sha256_bytes(data.tobytes())
                writer.write_tensor_data(data)
                task.advance()
        writer.close()
        if {one.name: sha256_bytes(one.data.tobytes()) for one in gguf.GGUFReader(target).tensors} != hashes:
            raise CalibrantError(f"{target}: differs from what was written; the disk may be failing")
        types = Counter(tensor.kind for tensor in self._tensors)
        return GgufFile(self.architecture, dict(types), target.stat().st_size, self._notes())

    def _planned(self) -> list[_Tensor]:
        """The tensors in the order of their names there."""
        folder, settings = self._folder, self._folder.quantization
        linears = quantized_linears(folder.tensors, settings)
        parts = {name for names in linears.values() for name in names} | cache_scales(folder.tensors, settings or {})
        others = [name for name in folder.tensors if name not in parts and not _is_left_out(self._config, name)]
        named = _names(self._config, {name.rpartition(".")[0] for name in others} | set(linears))
        found = []
        for name in others:
            base, _, suffix = name.rpartition(".")
            (tensor,) = named.tensors[base]
            found.append(self._dense(f"{tensor.name.removesuffix('.weight')}.{suffix}", name, base))
        with self._progress.task("checking", len(linears), "layers") as task:
            for base, stored in linears.items():
                (tensor,) = named.tensors[base]
                found.append(self._quantized(tensor.name, base, stored, settings or {}))
                task.advance()
        factors = rotary_factors(self._config)
        if factors is not None:
            found.append(_Tensor("rope_freqs.weight", "F32", tuple(factors.shape), lambda: _as_bytes(factors)))
        return sorted(found, key=lambda one: one.name)

    def _quantized(self, name: str, base: str, stored: list[str], settings: dict[str, Any]) -> _Tensor:
        """A linear whose codes are stored; they are read now for their type, and again when they are written."""

        layout = stored_layout(base, settings)
        if layout.type in FLOAT_TYPES:
            raise CalibrantError(f"{base}: {layout.type} weights, which no type holds without loss")
        if stored_format(settings) == GgufBlocks.name:
            return self._blocks(name, base, stored[0], settings["types"][base])

        def codes() -> Codes:
            read = stored_codes(base, stored, self._folder.read, settings)
            order = row_order(self._config, base, len(read.codes))
            return read if order is None else read.rows(order)

        try:
            first = codes()
            kind = block_type(first)
        except CalibrantError as error:
            raise CalibrantError(f"{base}: {error}") from error
        return _Tensor(name, _written(kind), tuple(first.codes.shape), lambda: pack_blocks(codes(), kind))

    def _blocks(self, name: str, base: str, stored: str, kind: str) -> _Tensor:
        """A linear that is stored as blocks; their rows are put in order."""
        rows, size = self._folder.tensors[stored].shape
        order = row_order(self._config, base, rows)

        def make() -> np.ndarray:
            blocks = self._folder.read(stored)
            return (blocks if order is None else blocks[order]).numpy()

        library = gguf_library()
        elements, length = library.GGML_QUANT_SIZES[library.GGMLQuantizationType[_written(kind)]]
        return _Tensor(name, _written(kind), (rows, size // length * elements), make)

    def _dense(self, name: str, stored: str, base: str) -> _Tensor:
        """Any other tensor: norms and biases in float32, as llama.cpp wants them, matrices as they are stored."""
        info = self._folder.tensors[stored]
        shape = info.shape
        kind = info.dtype if len(shape) > 1 else "F32"
        if kind not in ("F32", "F16", "BF16"):
            raise CalibrantError(f"{stored}: is stored as {kind}; F32, F16 and BF16 are written")
        rounded = self._embedding_type(shape) if name in _EMBEDDINGS else None
        if rounded is not None:
            return _Tensor(name, _written(rounded), shape, lambda: round_to_type(self._folder.read(stored), rounded))
        order = row_order(self._config, base, shape[0])
        offset = norm_offset(self._config, name)

        def make() -> np.ndarray:
            tensor = self._folder.read(stored)
            tensor = tensor if order is None else tensor[order]
            return _as_bytes(tensor.float() + offset if kind == "F32" else tensor)

        return _Tensor(name, kind, shape, make)

    def _embedding_type(self, shape: tuple[int, ...]) -> str | None:
        """The type of an embedding or output matrix: the one asked for, or the one that its width allows."""
        if self._embeddings == "stored":
            return None
        kind = self._embeddings.lower()
        if shape[-1] % GGUF_TYPES[kind].block:
            kind = GGUF_TYPES[kind].fallback or kind
        return kind if shape[-1] % GGUF_TYPES[kind].block == 0 else None

    def _describe(self, writer: Any) -> None:
        """Write the keys: what the model is, its tokenizer, and what made it."""
        for key, value in self._metadata.items():
            add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
            add(f"{self.architecture}.{key}", value)
        weights = Counter[str]()
        for tensor in self._tensors:
            weights[tensor.kind] += math.prod(tensor.shape) * (tensor.name not in _EMBEDDINGS)
        writer.add_file_type(_FILE_TYPES[weights.most_common(1)[0][0]])
        writer.add_quantization_version(gguf_library().GGML_QUANT_VERSION)
        record = self._record()
        writer.add_name(self._folder.name if record is None else record.model["name"])
        if record is not None:
            writer.add_string("calibrant.version", record.calibrant_version)
            writer.add_string("calibrant.recipe", record.recipe.name)
            if record.calibration is not None:
                writer.add_string("calibrant.set_sha256", record.calibration.set_sha256)
        _write_vocabulary(writer, self._vocabulary)
        hf = self._tokenizer.hf
        for name in ("bos", "eos", "unk", "pad"):
            index = getattr(hf, f"{name}_token_id")
            if index is not None:
                getattr(writer, f"add_{name}_token_id")(index)
        writer.add_add_bos_token(bool(self._tokenizer.prefix))
        writer.add_add_eos_token(False)
        template = hf.chat_template.get("default") if isinstance(hf.chat_template, dict) else hf.chat_template
        if template is not None:
            writer.add_chat_template(template)

    def _record(self) -> RunRecord | None:
        return RunRecord.read(self._folder.path) if (self._folder.path / RECORD_NAME).is_file() else None

    def _notes(self) -> tuple[str, ...]:
        notes = []
        kinds = {tensor.kind for tensor in self._tensors if tensor.name in _EMBEDDINGS} - {"F32", "F16", "BF16"}
        if kinds:
            notes.append(
                f"embeddings and output matrix are rounded to {', '.join(sorted(kinds))}, the rest is as stored"
            )
        other = [tensor for tensor in self._tensors if tensor.name in _EMBEDDINGS and tensor.kind != self._embeddings]
        if other and self._embeddings != "stored":
            columns = other[0].shape[-1]
            notes.append(
                f"{other[0].name} is {other[0].kind}: blocks of {self._embeddings} do not divide its {columns} columns"
            )
        if (self._folder.quantization or {}).get("format") == "int-quantized":
            notes.append("llama.cpp rounds activations in its own way, whatever the recipe's were")
        if kv_cache_layout(self._folder.quantization or {}) is not None:
            notes.append("llama.cpp keeps keys and values in a type of its own, whatever the recipe's was")
        return tuple(notes)


def _written(kind: str) -> str:
    """A type as llama.cpp spells it."""
    return kind.upper()


def round_to_type(weight: torch.Tensor, kind: str) -> np.ndarray:
    """``weight`` ``[out, in]`` rounded to nearest in blocks of ``kind``, uint8 ``[out, bytes]``."""
    spec = gguf_spec(kind, "none")
    grid = fit_grid(weight.float(), spec)
    return pack_blocks(Codes(encode(weight.float(), grid), **grid.stored(slice(None))), kind)


def _as_bytes(tensor: torch.Tensor) -> np.ndarray:
    found: np.ndarray = tensor.contiguous().view(torch.uint8).numpy()
    return found


def _write_vocabulary(writer: Any, vocabulary: GgufVocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.pre is not None:
        writer.add_tokenizer_pre(vocabulary.pre)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.space_first is not None:
        writer.add_add_space_prefix(vocabulary.space_first)
        writer.add_remove_extra_whitespaces(False)
