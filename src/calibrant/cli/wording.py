"""Translation of library messages, which name Python parameters in backticks, into command-line options."""

import re

# Options spelled differently from their parameters.
_SPELLED_OTHERWISE = {
    "allow_encoder": "--encoder",
    "checkpoint_format": "--format",
    "corpora": "--corpus",
    "schedule": "--temperature",
    "scripts": "--mix-scripts",
    "lengths": "--mix-lengths",
    "prompts": "--prompt",
    "tokenizer": "--model",
}
_SPELLED_ALIKE = (
    *(
        "against",
        "batch_size",
        "bits",
        "cache",
        "calibration",
        "corpus",
        "data",
        "device",
        "draw",
        "dtype",
        "duplicates",
        "embedding",
        "executor",
    ),
    *("field", "first_tokens", "group_size", "html", "keep", "keep_leaked", "leakage", "leakage_field", "leakage_run"),
    *("length", "limit", "mask", "max_characters", "max_repetition", "min_characters", "model", "order", "output"),
    *("overwrite", "parts", "percentile", "pool", "recipe", "samples", "save", "script", "seed", "shards", "strategy"),
    *("stride", "task_limit", "tasks", "temperature", "text", "weights", "wikitext", "windows"),
)
PARAMETERS = {name: "--" + name.replace("_", "-") for name in _SPELLED_ALIKE} | _SPELLED_OTHERWISE
_MENTION = re.compile(r"`(?P<name>[a-z_]+)(?:=(?P<value>[^`]+))?`")


def as_options(message: str) -> str:
    """``message`` with `` `overwrite=True` `` as ``--overwrite``, `` `order="two-pass"` `` as ``--order two-pass``."""

    def option(found: re.Match[str]) -> str:
        name, value = found["name"], found["value"]
        if name not in PARAMETERS:
            return found[0]
        return PARAMETERS[name] if value in (None, "True") else f"{PARAMETERS[name]} {value.strip(chr(34))}"

    return _MENTION.sub(option, message)
