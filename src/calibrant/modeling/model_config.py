"""``config.json`` of a model folder, checked before transformers builds anything from it."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from calibrant.errors import CalibrantError
from calibrant.modeling.json_file import read_json

QUANTIZATION_KEYS = ("quantization_config", "compression_config")
CONFIG_FILE = "config.json"
# Classes of transformers that write a text token by token, among them those that also take images or sounds.
_WRITERS = [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), *MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.values()]
LANGUAGE_MODELS = frozenset(name for one in _WRITERS for name in ((one,) if isinstance(one, str) else one))
_LARGEST_CONFIG_BYTES = 2**26
# Keys that count modules, of which transformers builds as many as a stranger's file says.
_LAYER_COUNT = re.compile(r"^(num|n)_.*(layers?|blocks)|layers?$|^depths?$")
_MODULE_COUNT = re.compile(r"^(num|n)_.*(experts|heads)")
_LABEL_COUNT = re.compile(r"^num_.*labels$")
# Ours: models with more are refused unless their checkpoint has as many tensors.
_MOST_LAYERS = 256
_MOST_MODULES = 4096
_MOST_LABELS = 2**20
_LARGEST_INTEGER = 2**40


def read_config_dict(folder: Path) -> dict[str, Any]:
    """The content of ``config.json``.

    Raises:
        CalibrantError: the file is missing, damaged or too large, or ``folder`` is an adapter without a model.
    """
    path = folder / CONFIG_FILE
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        base = read_json(adapter, _LARGEST_CONFIG_BYTES).get("base_model_name_or_path")
        raise CalibrantError(
            f"{adapter}: the folder holds an adapter{f' of {base}' if base else ''}, which transformers would load on "
            "top of the model; merge the adapter into the model (merge_and_unload of peft), or remove the adapter"
        )
    if not path.is_file():
        raise CalibrantError(f"{folder}: not a model folder, {CONFIG_FILE} is missing")
    return read_json(path, _LARGEST_CONFIG_BYTES)


def quantization_settings(config: dict[str, Any]) -> dict[str, Any] | None:
    """The description of quantized weights, wherever the loaders of transformers or vLLM look for one; None if none.

    A key whose value is null describes nothing.
    """
    for place in (config, config.get("text_config")):
        if isinstance(place, dict):
            for key in QUANTIZATION_KEYS:
                if place.get(key) is not None:
                    return place[key] if isinstance(place[key], dict) else {}
    return None


def without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    """``config`` without the descriptions that ``quantization_settings`` looks for."""
    kept = {name: value for name, value in config.items() if name not in QUANTIZATION_KEYS}
    text = kept.get("text_config")
    return {**kept, "text_config": without_quantization(text)} if isinstance(text, dict) else kept


def drop_quantization(config: transformers.PretrainedConfig) -> None:
    """The same of a configuration object, in place."""
    for one in (config, config.get_text_config()):
        for key in QUANTIZATION_KEYS:
            if hasattr(one, key):
                delattr(one, key)


def check_sizes(path: Path, config: dict[str, Any], tensors: int) -> None:
    """Refuse numbers of layers, experts and labels that would make transformers build modules without end.

    ``tensors`` is the number of stored tensors: a model has at least one for every layer and expert, or fuses them.

    Raises:
        CalibrantError: a number is beyond what such a checkpoint can hold.
    """
    limits = (
        (_LAYER_COUNT, max(tensors, _MOST_LAYERS)),
        (_MODULE_COUNT, max(tensors, _MOST_MODULES)),
        (_LABEL_COUNT, _MOST_LABELS),
    )
    for key, number in _integers(config):
        most = next((limit for pattern, limit in limits if pattern.search(key)), _LARGEST_INTEGER)
        if abs(number) > most:
            raise CalibrantError(
                f"{path}: {key} is {number}, more than a checkpoint of {tensors} tensors can have; correct the file"
            )


def _integers(value: Any, key: str = "") -> Iterator[tuple[str, int]]:
    """All integers in nested ``value`` with the key that they belong to."""
    waiting = [(key, value)]
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, dict):
            waiting.extend(value.items())
        elif isinstance(value, list):
            waiting.extend((key, one) for one in value)
        elif isinstance(value, int) and not isinstance(value, bool):
            yield key, value


def parse_config(folder: Path) -> transformers.PretrainedConfig:
    """The configuration object of transformers; code in the folder is not run.

    Raises:
        CalibrantError: transformers cannot read the file, or it describes no text model.
    """
    path = folder / CONFIG_FILE
    try:
        config: transformers.PretrainedConfig = transformers.AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        text = config.get_text_config()
        sizes = {name: getattr(text, name, None) for name in ("vocab_size", "hidden_size")}
    except Exception as error:  # invalid values raise any exception in the configuration classes
        # Messages of validation have the reason on their second line.
        said = " ".join(str(error).split()) or type(error).__name__
        raise CalibrantError(f"{path}: {said[:300]}") from error
    for name, size in sizes.items():
        if type(size) is not int or size < 1:
            raise CalibrantError(f"{path}: {name} of the text model is {size}, not a positive number")
    for one in (config, text):
        _check_not_nan(path, one)
    # Other values change what the modules return, which nothing that reads a model's output expects.
    config.return_dict = True
    config.output_hidden_states = config.output_attentions = False
    return config


def _check_not_nan(path: Path, config: transformers.PretrainedConfig) -> None:
    """Refuse NaN in what the model reads; transformers keeps keys that no model knows, whatever they hold.

    Raises:
        CalibrantError: a number of the model is NaN.
    """
    damaged = [key for key, value in config.to_dict().items() if any(map(math.isnan, _floats(value)))]
    if damaged:
        read = next((key for key in damaged if key in type(config)().to_dict()), None)
        if read is not None:
            raise CalibrantError(
                f"{path}: {read} has NaN for a number, with which a model computes NaN; correct the file"
            )


def _floats(value: Any) -> Iterator[float]:
    if isinstance(value, float):
        yield value
    elif isinstance(value, dict | list | tuple):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _floats(one)


def architecture(path: Path, config: dict[str, Any], allow_encoder: bool) -> str:
    """Name of the model class that ``config`` names.

    Raises:
        CalibrantError: transformers has no such class, or it is not a causal language model and ``allow_encoder`` is
            not set.
    """
    listed = config.get("architectures")
    named = listed[0] if isinstance(listed, list) and listed and isinstance(listed[0], str) else ""
    if named in LANGUAGE_MODELS:
        return named
    known = getattr(transformers, named, None) if allow_encoder and named else None
    if isinstance(known, type) and issubclass(known, transformers.PreTrainedModel):
        return named
    raise CalibrantError(
        f"{path}: architecture {named or 'not named'} is not a causal language model that transformers "
        f"{transformers.__version__} knows"
    )
