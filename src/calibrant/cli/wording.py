"""Translation of library messages, which name Python parameters in backticks, into command-line options."""

import re
from collections.abc import Collection

# Options spelled differently from their parameters.
_SPELLED_OTHERWISE = {
    "allow_encoder": "--encoder",
    "checkpoint_format": "--format",
    "corpora": "--corpus",
    "schedule": "--temperature",
    "scripts": "--mix-scripts",
    "lengths": "--mix-lengths",
    "prompts": "--prompt",
    "targets": "--target",
    "tokenizer": "--model",
}
_MENTION = re.compile(r"`(?P<name>[a-z_]+)(?:=(?P<value>[^`]+))?`")


def as_options(message: str, options: Collection[str]) -> str:
    """``message`` with `` `overwrite=True` `` as ``--overwrite``, `` `order="two-pass"` `` as ``--order two-pass``.

    Names that are none of the command's ``options`` are keys of a study's plan or of a recipe: `` `group_size=0` `` is
    written as in YAML, `` `group_size: 0` ``.
    """

    def option(found: re.Match[str]) -> str:
        name, value = found["name"], found["value"]
        spelled = _SPELLED_OTHERWISE.get(name, "--" + name.replace("_", "-"))
        if spelled not in options:
            return found[0] if value is None else f"`{name}: {value.strip(chr(34))}`"
        return spelled if value in (None, "True") else f"{spelled} {value.strip(chr(34))}"

    return _MENTION.sub(option, message)
