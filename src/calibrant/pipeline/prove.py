"""Proof that an engine computes what a model folder stores."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from calibrant.errors import CalibrantError
from calibrant.evaluation.agreement import Agreement, agreement, divergence_from, log_probabilities
from calibrant.evaluation.engines.ask import Answer, EngineName, Request, ask
from calibrant.evaluation.text import EvaluationText
from calibrant.formats.gguf_blocks import GgufBlocks
from calibrant.formats.gguf_names import gguf_library
from calibrant.formats.gguf_types import GGUF_TYPES
from calibrant.formats.gpt_oss import GptOssExperts
from calibrant.formats.stored_codes import quantized_linears, stored_layout
from calibrant.modeling.checkpoint import ModelFolder
from calibrant.modeling.decoded_tensors import decoded_dtype
from calibrant.modeling.dequantized_model import load_decoded, load_dequantized
from calibrant.modeling.input_rounding import round_inputs, round_to_bytes, round_to_dtype
from calibrant.modeling.structure import fused_parameters
from calibrant.modeling.tensor_sources import loaded_names
from calibrant.modeling.tokenizer import Tokenizer
from calibrant.modeling.whole_model import load_whole
from calibrant.pipeline.proof import Proof
from calibrant.pipeline.write_gguf import GgufExport
from calibrant.progress import Progress

# Likeliest tokens that an engine is asked for at each position (vLLM's own limit is 20).
_TOP = 20
# vLLM rounds a token's largest input to the largest int8 number; compressed-tensors to half a step more.
_VLLM_BYTE = 127.0
_GGUF_MAGIC = b"GGUF"
# Of dense matrices, what llama.cpp rounds inputs to.
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Question:
    """What an engine is asked: on which windows, in which dtype and on which device, and how much it shall write."""

    text: EvaluationText
    new_tokens: int
    dtype: str
    device: str
    threads: int


def prove_in_engine(
    folder: ModelFolder,
    engine: EngineName,
    python: Path | None,
    question: Question,
    *,
    against: ModelFolder | None,
    gguf: Path | None,
    progress: Progress,
) -> Proof:
    """Ask ``engine`` and compare; ``gguf`` is the file for llama.cpp (None: a temporary one).

    Raises:
        CalibrantError: the engine is not there, or fails on the model.
    """
    if engine != "llama.cpp" and (folder.quantization or {}).get("format") == GgufBlocks.name:
        raise CalibrantError(f'{folder.path}: only llama.cpp reads its blocks; prove it with `engine="llama.cpp"`')
    with _served(folder, engine, gguf, progress) as served:
        request = _request(folder, engine, served, question)
        with progress.task(f"asking {engine}", None):
            answer = ask(engine, python, request)
        reference = _decoded(folder, exact=True)
        if engine == "llama.cpp":
            _take_embeddings(reference, served)
        windows = list(question.text.windows)
        with progress.task("comparing", None):
            unrounded = log_probabilities(reference, windows)
            unpacked = None
            if engine == "transformers" and _is_packed(folder):
                unpacked = log_probabilities(_decoded(folder, exact=False), windows)
            _round_inputs(reference, folder, engine, served)
            dtype = torch.float32 if engine == "llama.cpp" else getattr(torch, question.dtype)
            if unpacked is not None and fused_parameters(reference):
                # Of scales, in which transformers multiplies unpacked experts.
                dtype = decoded_dtype(folder.config_dict)
            found = agreement(
                reference, windows, answer.positions, request.prompt, answer.written, dtype, unrounded, unpacked
            )
    with progress.task("the original", None):
        kl = None
        if against is not None:
            kl = divergence_from(load_whole(against, "cpu", "float32"), windows, answer.positions)
    return _proof(engine, request, answer, found, kl)


def _proof(engine: str, request: Request, answer: Answer, found: Agreement, kl: float | None) -> Proof:
    return Proof(
        engine=engine,
        version=answer.version,
        dtype="as stored in the file" if engine == "llama.cpp" else request.dtype,
        tokens=sum(map(len, answer.positions)),
        **asdict(found),
        new_tokens=len(answer.written),
        kl=kl,
        load_seconds=round(answer.load_seconds, 3),
        tokens_per_second=round(answer.tokens_per_second, 3),
        peak_bytes=answer.peak_bytes,
        agrees=not found.disagreement,
        disagreement=found.disagreement,
    )


@contextmanager
def _served(folder: ModelFolder, engine: EngineName, gguf: Path | None, progress: Progress) -> Iterator[Path]:
    """What the engine loads: the folder, or a GGUF file of it."""
    if engine != "llama.cpp":
        if gguf is not None:
            raise CalibrantError(f"{gguf}: only llama.cpp loads GGUF files, not {engine}")
        yield folder.path
    elif gguf is not None:
        _check_gguf(gguf)
        yield gguf
    else:
        with tempfile.TemporaryDirectory() as made:
            target = Path(made) / "model.gguf"
            GgufExport(folder, "Q8_0", progress).write(target)
            yield target


def _check_gguf(file: Path) -> None:
    """Refuse what llama.cpp says nothing about but that it fails."""
    if not file.is_file():
        raise CalibrantError(f"{file}: no such file; write it first (calibrant gguf), or leave `gguf` out")
    with file.open("rb") as stream:
        if stream.read(len(_GGUF_MAGIC)) != _GGUF_MAGIC:
            raise CalibrantError(f"{file}: is no GGUF file; write it again (calibrant gguf)")


def _request(folder: ModelFolder, engine: EngineName, served: Path, question: Question) -> Request:
    windows = question.text.windows.tolist()
    prompt = windows[0][: max(1, len(windows[0]) // 2)]
    return Request(
        model=str(served.resolve()),
        architecture=folder.architecture,
        windows=windows,
        prompt=prompt,
        new_tokens=question.new_tokens,
        top=min(_TOP, folder.vocabulary),
        dtype=question.dtype,
        device=question.device,
        dequantize=engine == "transformers" and _needs_dequantizing(folder),
        plain_token=_plain_token(folder),
        threads=question.threads,
    )


def _is_packed(folder: ModelFolder) -> bool:
    """Whether transformers may unpack weights to the dtype of their scales: asymmetric ones, and those of experts."""
    return (folder.quantization or {}).get("format") == "pack-quantized"


def _needs_dequantizing(folder: ModelFolder) -> bool:
    """Whether transformers loads the folder only with the option to unpack: asymmetric packed weights."""
    settings = folder.quantization or {}
    groups = settings.get("config_groups", {}).values()
    return _is_packed(folder) and not all(group["weights"]["symmetric"] for group in groups)


def _plain_token(folder: ModelFolder) -> int:
    """A token of whole characters."""
    tokenizer = Tokenizer(folder.path)
    special = set(tokenizer.hf.all_special_ids)
    texts = ((index, tokenizer.decode([index])) for index in range(folder.vocabulary) if index not in special)
    return next(index for index, text in texts if text.isascii() and text.isalnum())


def _decoded(folder: ModelFolder, exact: bool) -> transformers.PreTrainedModel:
    """The folder's model in float32, decoded here, without any rounding of inputs; codes are multiplied with scales in
    float32, or if not ``exact`` in the dtype of the scales, as transformers does it when it unpacks."""
    if folder.quantization is None:
        return load_whole(folder, "cpu", "float32")
    if folder.quantization.get("quant_method") == GptOssExperts.name:
        return load_decoded(ModelFolder(folder.path, dequantize=True), torch.device("cpu"), torch.float32)
    return load_dequantized(folder, torch.device("cpu"), torch.float32, exact)


def _take_embeddings(model: transformers.PreTrainedModel, file: Path) -> None:
    """Give ``model`` the embeddings and the output matrix of the GGUF ``file``.

    Raises:
        CalibrantError: the file is of another model.
    """
    embedding: Any = model.get_input_embeddings()
    for name, module in (("token_embd.weight", embedding), ("output.weight", _head(model))):
        stored = _tensors(file).get(name)
        if stored is None:
            continue
        values = torch.from_numpy(np.array(gguf_library().dequantize(stored.data, stored.tensor_type)))
        if values.shape != module.weight.shape:
            raise CalibrantError(f"{file}: {name} has shape {tuple(values.shape)}, the model's {module.weight.shape}")
        module.weight.data.copy_(values)


def _round_inputs(model: transformers.PreTrainedModel, folder: ModelFolder, engine: EngineName, served: Path) -> None:
    """Have ``model`` round inputs as ``engine`` does: llama.cpp in its own way, whatever the checkpoint says."""
    if engine != "llama.cpp":
        round_inputs(model, folder, _VLLM_BYTE if engine == "vllm" else None)
        return
    head = _head(model)
    linears = quantized_linears(folder.tensors, folder.quantization)
    weights = [f"{linear}.weight" for linear in linears] + [name for name in folder.tensors if name.endswith(".weight")]
    modules = dict(model.named_modules())
    for stored, loaded in loaded_names(model, weights).items():
        name, module = stored.removesuffix(".weight"), modules.get(loaded.removesuffix(".weight"))
        if not isinstance(module, torch.nn.Linear) or module is head:
            continue
        if name not in linears or folder.quantization is None:
            _as_stored(module, folder.tensors[stored].dtype)
            continue
        known = GGUF_TYPES.get(stored_layout(name, folder.quantization).type)
        round_to_bytes(module, known is not None and known.sub_scale is not None)
    tensors = _tensors(served)
    kind = tensors.get("output.weight", tensors["token_embd.weight"]).tensor_type.name
    if kind.lower() in GGUF_TYPES:
        round_to_bytes(head, GGUF_TYPES[kind.lower()].sub_scale is not None)
    else:
        _as_stored(head, kind)


def _as_stored(linear: torch.nn.Module, dtype: str) -> None:
    """Inputs are rounded to the dtype of dense weights."""
    if dtype in _DTYPES:
        round_to_dtype(linear, _DTYPES[dtype])


def _tensors(file: Path) -> dict[str, Any]:
    """The tensors of a GGUF file by name."""
    return {one.name: one for one in gguf_library().GGUFReader(file).tensors}


def _head(model: transformers.PreTrainedModel) -> Any:
    return model.get_output_embeddings()
