"""YAML files as plain values, within bounds: recipes and study plans may come from strangers."""

from pathlib import Path
from typing import Any

import yaml

from calibrant.errors import CalibrantError, first_line

LARGEST_FILE = 32_768
_DEEPEST = 20
_LARGEST_INTEGER = 2**63


def read_yaml_file(path: Path, kind: str) -> str:
    """The text of a YAML file that describes something: a ``kind``, such as "recipe".

    Raises:
        CalibrantError: it is too large, cannot be read or is not UTF-8.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(LARGEST_FILE + 1)
        text = data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrantError(
            f"{path}: cannot be read ({error.strerror if isinstance(error, OSError) else error})"
        ) from error
    if len(data) > LARGEST_FILE:
        raise CalibrantError(f"{path}: more than {LARGEST_FILE} bytes; a {kind} is a short YAML file")
    return text


def parse_yaml(text: str, origin: str, kind: str) -> Any:
    """The value that the YAML document ``text`` describes: mappings, lists, strings, numbers, true, false and null.

    Raises:
        CalibrantError: it is not YAML, or has tags, aliases, deep nesting, or values that cannot be recorded.
    """
    try:
        _check_structure(text)
        _check_keys(yaml.compose(text, Loader=yaml.SafeLoader))
        value = yaml.safe_load(text)
        _check_scalars(value)
    except Exception as error:  # PyYAML's constructors raise any exception on malformed scalars
        said = " ".join(str(error).split()) if isinstance(error, yaml.YAMLError) else first_line(error)
        raise CalibrantError(f"{origin}: not YAML that a {kind} can have ({said})") from error
    return value


def _check_structure(text: str) -> None:
    """Refuse what makes a value much larger than its file, or that the parser recurses into, before it is built."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1  # type: ignore[union-attr]  # parsed events have a mark
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"line {line}: an alias, *{event.anchor}; write its value instead")
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise ValueError(f"line {line}: a tag, {tag}; write plain values")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise ValueError(f"line {line}: nested deeper than {_DEEPEST} levels")


def _check_keys(node: yaml.Node | None) -> None:
    """Refuse keys that a mapping has twice, of which YAML would take the last."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen and isinstance(key, yaml.ScalarNode):
                raise ValueError(f"line {key.start_mark.line + 1}: the key {key.value[:40]} stands there twice")
            seen.add(str(key.value))
            _check_keys(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _check_keys(value)


def _check_scalars(value: object) -> None:
    """Refuse scalars that a record cannot hold: dates, integers beyond 64 bits, strings that are no Unicode text."""
    if isinstance(value, dict):
        for key, one in value.items():
            if not isinstance(key, str):
                raise ValueError(f"the key {str(key)[:40]} is not a string; put it in quotes")
            _check_scalars(key)
            _check_scalars(one)
    elif isinstance(value, list):
        for one in value:
            _check_scalars(one)
    elif isinstance(value, str):
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError(f"{value[:40]!a} has half of a surrogate pair, which is no character")
    elif isinstance(value, int):
        if not -_LARGEST_INTEGER <= value < _LARGEST_INTEGER:
            raise ValueError("an integer beyond 64 bits")
    elif not isinstance(value, float | None):
        raise ValueError(f"{value} is read as a {type(value).__name__}; put it in quotes")
