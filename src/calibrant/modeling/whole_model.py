"""A model loaded whole by transformers, for writing text and for scoring it."""

import copy
from typing import Any

import torch
import transformers

from calibrant.errors import CalibrantError, first_line
from calibrant.formats.dense import dense_weights
from calibrant.formats.input_rounding import read_input_rounding
from calibrant.modeling.checkpoint import ModelFolder, model_class
from calibrant.modeling.input_rounding import apply_input_rounding
from calibrant.modeling.quietly import quietly

# Processor features that multiply bfloat16 faster than float32 (x86 twice, Arm).
_BFLOAT16_UNITS = ("avx512_bf16", "amx_bf16", "bf16")


def torch_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        CalibrantError: there is none here.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise CalibrantError(f"{name}: no such device; there are cpu and cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise CalibrantError(f"{name}: no such device; there are cpu and cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise CalibrantError(f"{name}: this machine has no CUDA device that torch can use; use --device cpu")
    return device


def torch_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of that name; "auto" is bfloat16 where the device multiplies it fast.

    Raises:
        CalibrantError: no such dtype to compute in.
    """
    if name == "auto":
        units = torch.cpu.get_capabilities()
        fast = device.type == "cuda" or any(units.get(unit) for unit in _BFLOAT16_UNITS)
        return torch.bfloat16 if fast else torch.float32
    known = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    if name not in known:
        raise CalibrantError(f"{name}: no such dtype to compute in; there are auto, bfloat16, float32")
    return known[name]


def _unpacking(folder: ModelFolder) -> dict[str, Any]:
    """Packed weights are unpacked: transformers 5.23 fails to load asymmetric ones otherwise.

    Of mixed widths it unpacks none right; those are symmetric and load as they are.
    """
    settings = folder.config_dict.get("quantization_config")
    if not isinstance(settings, dict) or settings.get("format") != "pack-quantized":
        return {}
    if len(settings.get("config_groups", {})) > 1:
        return {}
    return {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)}


def _load_dequantized(
    folder: ModelFolder, settings: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> transformers.PreTrainedModel:
    """The model with its weights unpacked here: transformers' own loaders of these formats need further packages."""
    state = dense_weights(folder.tensors, folder.read, settings)
    config = copy.deepcopy(folder.config)
    del config.quantization_config
    load: Any = model_class(folder.architecture).from_pretrained
    model: Any = load(None, config=config, state_dict=state, dtype=dtype)
    loaded: transformers.PreTrainedModel = model.to(device=device).eval()
    return loaded


def load_whole(folder: ModelFolder, device: str, dtype: str) -> transformers.PreTrainedModel:
    """The model in ``folder``, in evaluation mode.

    Raises:
        CalibrantError: it cannot be loaded, or its files lack weights.
    """
    place = torch_device(device)
    settings = folder.config_dict.get("quantization_config")
    if isinstance(settings, dict) and settings.get("quant_method") in ("gptq", "awq"):
        return _load_dequantized(folder, settings, place, torch_dtype(dtype, place))
    load: Any = model_class(folder.architecture).from_pretrained  # typed by transformers for the model alone
    try:
        with quietly():
            model, found = load(
                str(folder.path),
                dtype=torch_dtype(dtype, place),
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                **_unpacking(folder),
            )
    except Exception as error:  # a config can fail in as many ways as transformers has models
        raise CalibrantError(f"{folder.path}: transformers cannot load it ({first_line(error)})") from error
    if found["missing_keys"]:
        # transformers fills them with random numbers.
        missing = min(found["missing_keys"])
        raise CalibrantError(f"{folder.path}: its files lack {missing}; copy or download it again")
    loaded: transformers.PreTrainedModel = model.to(device=place).eval()
    if settings is not None:
        with quietly(), torch.inference_mode():
            # Such a model unpacks itself in its first forward pass, and draws bars.
            loaded(input_ids=torch.zeros(1, 1, dtype=torch.long, device=place))
    apply_input_rounding(loaded, read_input_rounding(folder.path))
    return loaded
