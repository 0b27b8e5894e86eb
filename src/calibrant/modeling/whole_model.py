"""Models loaded completely by transformers, to generate and to score text."""

import copy
from typing import Any

import torch
import transformers

from calibrant.errors import CalibrantError, first_line
from calibrant.formats.input_rounding import read_input_rounding
from calibrant.modeling.checkpoint import ModelFolder, model_class
from calibrant.modeling.dequantized_model import check_found, load_decoded, load_dequantized
from calibrant.modeling.input_rounding import apply_input_rounding, round_inputs
from calibrant.modeling.lazy_model import LazyModel
from calibrant.modeling.quietly import quietly

# Formats whose loaders need other packages or a dtype, or round inputs otherwise than they should: compressed-tensors
# 0.20 takes one scale for all tokens where a linear's input is not ``[rows, length, width]`` (OPT's, DeepSeek-V3's).
_DECODED_HERE = {
    "gptq", "awq", "mxfp4-pack-quantized", "nvfp4-pack-quantized", "gguf-blocks", "int-quantized", "float-quantized",
}  # fmt: skip
# Processor features whose bfloat16 products are faster than float32 (two of x86, one of Arm).
_BFLOAT16_UNITS = ("avx512_bf16", "amx_bf16", "bf16")


def torch_device(name: str) -> torch.device:
    """The device called ``name``: "cpu", "cuda" or "cuda:N".

    Raises:
        CalibrantError: the machine has no such device.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise CalibrantError(f"{name}: no such device; there are cpu and cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise CalibrantError(f"{name}: no such device; there are cpu and cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise CalibrantError(f"{name}: this machine has no CUDA device that torch can use; choose cpu with `device`")
    return device


def torch_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype called ``name``; "auto" is bfloat16 where ``device`` multiplies it faster than float32, else float32.

    Raises:
        CalibrantError: the name is not "auto", "bfloat16" or "float32".
    """
    if name == "auto":
        units = torch.cpu.get_capabilities()
        fast = device.type == "cuda" or any(units.get(unit) for unit in _BFLOAT16_UNITS)
        return torch.bfloat16 if fast else torch.float32
    known = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    if name not in known:
        raise CalibrantError(f"{name}: no such dtype to compute in; there are auto, bfloat16, float32")
    return known[name]


def _unpacking_options(folder: ModelFolder) -> dict[str, Any]:
    """Options that make transformers unpack packed weights while loading: asymmetric ones fail to load otherwise.

    Checkpoints of mixed widths are loaded packed: they are symmetric, and transformers unpacks them wrongly (as of
    5.23).
    """
    settings = folder.quantization
    if settings is None or settings.get("format") != "pack-quantized":
        return {}
    groups = settings.get("config_groups", {}).values()
    # Unpacked models round no inputs.
    if len(groups) > 1 or any(group.get("input_activations") for group in groups):
        return {}
    return {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)}


def _try(model: transformers.PreTrainedModel, folder: ModelFolder) -> None:
    """Run the model once; quantized models decompress in their first forward pass, with progress bars.

    Raises:
        CalibrantError: the configuration makes a model that does not run.
    """
    try:
        with quietly(), torch.inference_mode():
            model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)
    except Exception as error:  # invalid configurations raise any exception in the model classes
        raise CalibrantError(
            f"{folder.path}: the model that config.json describes does not run ({first_line(error)})"
        ) from error


def load_whole(folder: ModelFolder, device: str, dtype: str) -> transformers.PreTrainedModel:
    """Load the model in ``folder`` in evaluation mode; rounding of inputs in ``input_rounding.json`` is applied.

    ``device`` and ``dtype`` are names as in ``torch_device`` and ``torch_dtype``.

    Raises:
        CalibrantError: the model cannot be loaded, its files lack weights, or the device or dtype is unknown.
    """
    place = torch_device(device)
    settings = folder.quantization
    if folder.decoded:
        return load_decoded(folder, place, torch_dtype(dtype, place))
    kinds = {str((settings or {}).get(key)) for key in ("quant_method", "format")}
    if kinds & _DECODED_HERE:
        # compressed-tensors multiplies codes with scales in the dtype that the model is loaded in.
        exact = bool(kinds & {"int-quantized", "float-quantized"})
        dequantized = load_dequantized(folder, place, torch_dtype(dtype, place), exact)
        round_inputs(dequantized, folder)
        return dequantized
    if settings is None:
        LazyModel(folder, torch_dtype(dtype, place), place)  # checks names and shapes before memory is taken
    load: Any = model_class(folder.architecture).from_pretrained  # transformers' types ignore output_loading_info
    try:
        with quietly():
            model, found = load(
                str(folder.path),
                config=copy.deepcopy(folder.config),
                dtype=torch_dtype(dtype, place),
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                **_unpacking_options(folder),
            )
    except Exception as error:  # invalid configurations raise any exception in the model classes
        raise CalibrantError(f"{folder.path}: transformers cannot load it ({first_line(error)})") from error
    check_found(model, found, folder)
    loaded: transformers.PreTrainedModel = model.to(device=place).eval()
    _try(loaded, folder)
    apply_input_rounding(loaded, read_input_rounding(folder.path))
    return loaded
