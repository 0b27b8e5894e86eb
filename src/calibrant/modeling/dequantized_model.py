"""Quantized models loaded as dense ones, with weights that are decoded here."""

import copy
from typing import Any

import torch
import transformers

from calibrant.errors import CalibrantError
from calibrant.formats.stored_codes import dense_weights
from calibrant.modeling.checkpoint import ModelFolder, model_class
from calibrant.modeling.expert_tensors import join_split_experts
from calibrant.modeling.model_config import drop_quantization
from calibrant.modeling.quietly import quietly
from calibrant.modeling.tensor_sources import layer_of


def load_dequantized(
    folder: ModelFolder, device: torch.device, dtype: torch.dtype, exact: bool = False
) -> transformers.PreTrainedModel:
    """The quantized model in ``folder`` in evaluation mode, with decoded weights of ``dtype``; it rounds no inputs.

    Loaders of GPTQ and AWQ need further packages, those of four-bit floats compute in bfloat16 alone. Codes are
    multiplied with scales in the dtype of these, or in float32 if ``exact``.

    Raises:
        CalibrantError: the checkpoint is damaged, or its format is not read here.
    """
    settings = folder.quantization
    assert settings is not None
    config = copy.deepcopy(folder.config)
    drop_quantization(config)
    return _load(folder, config, dense_weights(folder.tensors, folder.read, settings, exact), device, dtype)


def load_decoded(folder: ModelFolder, device: torch.device, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """The same of a ``folder`` that was opened to be decoded.

    Raises:
        CalibrantError: the checkpoint is damaged.
    """
    return _load(
        folder, copy.deepcopy(folder.config), {name: folder.read(name) for name in folder.tensors}, device, dtype
    )


def _load(
    folder: ModelFolder, config: Any, state: dict[str, torch.Tensor], device: torch.device, dtype: torch.dtype
) -> transformers.PreTrainedModel:
    made = model_class(folder.architecture)
    load: Any = made.from_pretrained
    with quietly():
        with torch.device("meta"):
            skeleton = made._from_config(config)
        join_split_experts(skeleton, state)
        model, found = load(None, config=config, state_dict=state, dtype=dtype, output_loading_info=True)
    loaded: transformers.PreTrainedModel = model.to(device=device).eval()
    check_found(loaded, found, folder)
    return loaded


def check_found(model: transformers.PreTrainedModel, found: dict[str, Any], folder: ModelFolder) -> None:
    """Refuse what transformers only warns of: weights that it makes up, and values that it drops."""
    if found["missing_keys"]:
        missing = min(found["missing_keys"])
        raise CalibrantError(f"{folder.path}: its files lack {missing}; copy or download it again")
    modules = dict(model.named_modules())
    owners = ((name, layer_of(name, modules)) for name in sorted(found["unexpected_keys"]))
    for name, owner in owners:
        # Old quantizers store biases of zeros for layers without one.
        if owner is not None and (name not in folder.tensors or bool(folder.read(name).float().any())):
            raise CalibrantError(
                f"{folder.path}: tensor {name} belongs to layer {owner}, which does not take it; "
                "start from the original weights"
            )
