"""Which stored tensors fill which parameters of a model; every tensor of a checkpoint is accounted for."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from calibrant.errors import CalibrantError
from calibrant.modeling.weight_files import TensorInfo

_PLAIN_DTYPES = {"F64", "F32", "F16", "BF16"}
# Buffers that older versions of transformers stored and current ones compute.
_COMPUTED_BUFFER = re.compile(r"(^|\.)(inv_freq|position_ids|masked_bias|cos_cached|sin_cached|rope\.freqs)$")
_MASK_DIMENSIONS = 4


@dataclass(frozen=True)
class TensorSources:
    """Accounts for all stored tensors.

    Attributes:
        of: names of the stored tensors that each parameter or buffer is made of, by parameter name.
        converted: parameters that are not stored as they are, such as fused experts stored one by one.
        renamed: parameter names by stored name, for tied parameters stored under the name that is usually left out.
        unused: stored tensors that no parameter takes, such as draft heads; outputs keep them as they are.
    """

    of: dict[str, list[str]]
    converted: frozenset[str]
    renamed: dict[str, str]
    unused: tuple[str, ...]


def account_for_tensors(
    model: transformers.PreTrainedModel, rules: list[Any], tensors: Mapping[str, TensorInfo], folder: Path
) -> TensorSources:
    """Assign the stored ``tensors`` of ``folder`` to the parameters of ``model`` by transformers' conversion ``rules``.

    Raises:
        CalibrantError: a tensor belongs to a layer that does not take it (``q_proj.lora_A``, ``q_proj.weight_scale``),
            holds codes instead of numbers, or a parameter has no tensor.
    """
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    known = model.state_dict()
    buffers = dict(model.named_buffers())
    modules = dict(model.named_modules())
    sources: dict[str, list[str]] = {}
    converted: set[str] = set()
    unused: list[tuple[str, str]] = []
    for name, info in tensors.items():
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if target not in known and name in known:
            target, pattern = name, None
        if target in known:
            _check_dtype(folder, name, info, known[target])
            if pattern is not None:
                converted.add(target)
            sources.setdefault(target, []).append(name)
        elif target not in buffers:
            unused.append((name, target))
    used = {name.removesuffix(".weight") for names in sources.values() for name in names if name.endswith(".weight")}
    for name, target in unused:
        _check_unused(folder, name, target, tensors[name], modules, used)
    unused = [(name, target) for name, target in unused if not _is_computed_buffer(name, tensors[name])]
    renamed = _stored_under_other_name(model, sources)
    _check_complete(model, sources, converters, folder)
    return TensorSources(sources, frozenset(converted), renamed, tuple(name for name, _ in unused))


def loaded_names(model: transformers.PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """The names that transformers gives the stored tensors ``names`` when it loads them into ``model``."""
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    known = model.state_dict()
    return {name: rename_source_key(name, renamings, [], model.base_model_prefix, known)[0] for name in names}


def _check_dtype(folder: Path, name: str, info: TensorInfo, taken_by: torch.Tensor) -> None:
    """Refuse codes in place of numbers: transformers would convert them as if they were the weights themselves."""
    if taken_by.is_floating_point() and info.dtype not in _PLAIN_DTYPES:
        raise CalibrantError(
            f"{folder}: tensor {name} is stored as {info.dtype}, which is no dtype of plain weights (codes of a "
            "quantized model have such dtypes); start from the original weights"
        )


def _is_computed_buffer(name: str, info: TensorInfo) -> bool:
    is_mask = name.endswith(".bias") and len(info.shape) == _MASK_DIMENSIONS
    return is_mask or _COMPUTED_BUFFER.search(name) is not None


def _check_unused(
    folder: Path, name: str, target: str, info: TensorInfo, modules: dict[str, nn.Module], used: set[str]
) -> None:
    owner = layer_of(target, modules) or next((prefix for prefix in _prefixes(name) if prefix in used), None)
    if owner is not None:
        raise CalibrantError(
            f"{folder}: tensor {name} belongs to layer {owner}, but the model that config.json describes does not take "
            "it, and its values would be lost; correct config.json, merge adapters, or start from the original weights"
        )
    if info.dtype not in _PLAIN_DTYPES and len(info.shape) > 1 and not _is_computed_buffer(name, info):
        raise CalibrantError(
            f"{folder}: tensor {name} is stored as {info.dtype} and no parameter takes it; codes of quantized "
            "models have such dtypes: start from the original weights"
        )


def layer_of(name: str, modules: dict[str, nn.Module]) -> str | None:
    """Innermost module that tensor ``name`` is named after, if that is a layer: it has weights, but no parts."""
    owner = next((prefix for prefix in _prefixes(name) if prefix in modules), None)
    if owner is None:
        return None
    module = modules[owner]
    is_layer = next(module.children(), None) is None and next(module.parameters(), None) is not None
    return owner if is_layer else None


def _prefixes(name: str) -> list[str]:
    """The modules that a tensor may belong to by its ``name``, innermost first."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1)]


def _stored_under_other_name(model: transformers.PreTrainedModel, sources: dict[str, list[str]]) -> dict[str, str]:
    """Move a tied parameter's tensor to the parameter that the others are tied to, as transformers does."""
    renamed: dict[str, str] = {}
    for other, main in model.all_tied_weights_keys.items():
        if main not in sources and len(sources.get(other, ())) == 1:
            sources[main] = sources.pop(other)
            renamed[sources[main][0]] = main
    return renamed


def _check_complete(
    model: transformers.PreTrainedModel,
    sources: dict[str, list[str]],
    converters: list[WeightConverter],
    folder: Path,
) -> None:
    tied = set(model.all_tied_weights_keys)
    missing = [name for name, _ in model.named_parameters() if name not in sources and name not in tied]
    # transformers lists the sources of a converter with several targets under the first target only.
    split = [pattern for rule in converters if len(rule.target_patterns) > 1 for pattern in rule.target_patterns]
    missing = [name for name in missing if not any(re.search(pattern, name) for pattern in split)]
    if missing:
        raise CalibrantError(f"{folder}: the checkpoint has no weights for {missing[0]}")
