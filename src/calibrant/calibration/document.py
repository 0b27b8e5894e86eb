"""Documents: one text or conversation with a stable id, read from a row of a corpus in any format."""

import datetime
import json
import math
import numbers
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

Message = dict[str, Any]
# Corpora do not know what they are read for.
NAME_THE_FIELD = "name it with `field` (for targets `target_field`, for leakage `leakage_field`)"
TOOLS = "tools"
# What a message says, beside its tool calls; templates know the model's thoughts by several names.
_SAID = ("reasoning_content", "reasoning", "thinking", "content")
# Who speaks in data sets that are made like ShareGPT; other names are the roles.
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
# Deeper values end in errors of the recursion limit, here or in a template.
_DEEPEST = 64


@dataclass(frozen=True)
class Document:
    """One text with an id that stays the same as long as its corpus does.

    A conversation also has ``messages``, JSON objects with a "role", usually a "content" (a text, or a list of parts
    of type "text") and whatever else the chat template reads, and perhaps ``tools``, descriptions of functions. Its
    ``text`` is what the messages say and call, joined by line ends.
    """

    id: str
    text: str
    messages: tuple[Message, ...] | None = None
    tools: tuple[dict[str, Any], ...] | None = None

    @property
    def has_text(self) -> bool:
        """Whether there is more than white space."""
        return bool(self.text) and not self.text.isspace()


@dataclass(frozen=True)
class Unusable:
    """A row that is no document: its id, its place for a message, and why; ``too_long`` ones are counted apart."""

    id: str
    place: str
    reason: str
    too_long: bool = False


Row = Document | Unusable


def row_document(row: Any, field: str, name: str, place: str) -> Row:
    """The text or conversation under ``field`` of ``row``, as the document ``name``; ``place`` is for messages.

    Of several fields ("premise,hypothesis") the texts are joined by line ends.
    """
    if not isinstance(row, Mapping):
        return Unusable(name, place, f"no object with a text under {field!r} (found: {type(row).__name__})")
    names = field_names(field, row)
    missing = next((one for one in names if one not in row), None)
    if missing is not None:
        found = ", ".join(map(str, row))
        return Unusable(name, place, f"no text under {missing!r} (found: {found}); {NAME_THE_FIELD}")
    if len(names) == 1:
        return value_document(row[field], row.get(TOOLS), name, place)
    values = [row[one] for one in names if row[one] is not None]
    other = next((value for value in values if not isinstance(value, str)), None)
    if other is not None:
        return Unusable(name, place, f"only texts can be joined, and one of {field} is a {type(other).__name__}")
    return value_document("\n".join(values), None, name, place)


def field_names(field: str, known: Container[str]) -> list[str]:
    """The fields that ``field`` names: itself, or those between its commas if there is no field of that name."""
    return [field] if field in known else [one.strip() for one in field.split(",")]


def value_document(value: Any, tools: Any, name: str, place: str) -> Row:
    """A text, a list of messages or a ``Document`` as the document ``name``; null is an empty text."""
    try:
        return _checked(_document(value, tools, name))
    except ValueError as error:
        return Unusable(name, place, str(error))


def _document(value: Any, tools: Any, name: str) -> Document:
    if isinstance(value, Document):
        return value if value.messages is None else replace(value, messages=_messages(value.messages))
    if value is None or isinstance(value, str):
        return Document(name, value or "")
    if not isinstance(value, list | tuple):
        raise ValueError(f"neither a text nor a conversation, got {type(value).__name__}")
    messages = _messages(value)
    return Document(name, "\n".join(_said(messages)), messages, _tools(tools))


def _messages(values: Sequence[Any]) -> tuple[Message, ...]:
    """The messages as plain JSON without nulls: Parquet cannot tell null from a key that is not there.

    Raises:
        ValueError: one is no message; the text says which and why.
    """
    if not values:
        raise ValueError("neither a text nor a conversation, it has no message")
    messages = []
    for number, value in enumerate(values, start=1):
        if not isinstance(value, Mapping):
            raise ValueError(f"neither a text nor a conversation, message {number} is a {type(value).__name__}")
        message = _renamed({key: _plain(part) for key, part in value.items() if part is not None})
        if not isinstance(message.get("role"), str):
            raise ValueError(f"message {number} has no role (found: {', '.join(map(str, value))})")
        if isinstance(message.get("content"), list):
            message["content"] = [_text_part(part, number) for part in message["content"]]
        elif not isinstance(message.get("content", ""), str):
            raise ValueError(f"the content of message {number} is neither a text nor a list of texts")
        messages.append(message)
    return tuple(messages)


def _renamed(message: Message) -> Message:
    """A message of ShareGPT with the keys and roles that templates know; any other as it is."""
    if "role" in message or "content" in message or not isinstance(message.get("from"), str) or "value" not in message:
        return message
    rest = {key: part for key, part in message.items() if key not in ("from", "value")}
    return {"role": _SHAREGPT_ROLES.get(message["from"], message["from"]), "content": message["value"], **rest}


def _text_part(part: Any, number: int) -> dict[str, Any]:
    """The part of message ``number`` with its type, since templates leave out parts that do not say theirs."""
    if isinstance(part, str):
        return _as_part(part)
    if isinstance(part, dict) and part.get("type", "text") != "text":
        raise ValueError(f"message {number} has a part of type {part['type']}, which is no text")
    if not isinstance(part, dict) or not isinstance(part.get("text"), str):
        raise ValueError(f"the content of message {number} has a part without a text")
    return {**part, "type": "text"}


def _as_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def joined_parts(messages: Sequence[Message]) -> list[Message]:
    """The messages with lists of text parts joined by line ends."""
    return [
        {**one, "content": "\n".join(part["text"] for part in one["content"])}
        if isinstance(one.get("content"), list)
        else one
        for one in messages
    ]


def split_into_parts(messages: Sequence[Message]) -> list[Message]:
    """The messages with every text as a list of one part."""
    return [
        {**one, "content": [_as_part(one["content"])]} if isinstance(one.get("content"), str) else one
        for one in messages
    ]


def has_parts(messages: Sequence[Message]) -> bool:
    """Whether a message's content is a list of parts."""
    return any(isinstance(one.get("content"), list) for one in messages)


def _said(messages: Sequence[Message]) -> list[str]:
    said = []
    for message in joined_parts(messages):
        said += [message[key] for key in _SAID if isinstance(message.get(key), str) and message[key]]
        if message.get("tool_calls"):
            said.append(json.dumps(message["tool_calls"], ensure_ascii=False))
    return said


def _tools(value: Any) -> tuple[dict[str, Any], ...] | None:
    """Descriptions of functions from a list, or from its JSON, as many data sets have it."""
    try:
        found = json.loads(value) if isinstance(value, str) and value.strip() else value
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{TOOLS!r} is a text, but not JSON ({error})") from error
    if not found:
        return None
    if not isinstance(found, list | tuple) or not all(isinstance(one, Mapping) for one in found):
        raise ValueError(f"{TOOLS!r} is no list of descriptions of functions")
    return tuple(_plain(found))


def _plain(value: Any, depth: int = 0) -> Any:
    """``value`` as JSON has it, without nulls in objects."""
    if depth > _DEEPEST:
        raise ValueError(f"a message is nested more than {_DEEPEST} levels deep")
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, numbers.Integral):  # NumPy's too
        return int(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(one, depth + 1) for key, one in value.items() if one is not None}
    if isinstance(value, list | tuple):
        return [_plain(one, depth + 1) for one in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, float) and math.isfinite(value):
        return value
    raise ValueError(f"a message holds {value if isinstance(value, float) else 'a ' + type(value).__name__}")


def _checked(document: Document) -> Document:
    """``document``, if it is text that tokenizers take.

    Raises:
        ValueError: a surrogate is not part of a pair.
    """
    try:
        document.text.encode()
        json.dumps([document.messages, document.tools], ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError("text with half of a surrogate pair, which is not Unicode") from error
    return document
