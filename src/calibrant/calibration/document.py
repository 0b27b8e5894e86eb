"""Documents: one text or conversation with a stable id."""

from dataclasses import dataclass
from typing import Any

from calibrant.errors import CalibrantError

Message = dict[str, str]


@dataclass(frozen=True)
class Document:
    """One text with an id that stays the same as long as its corpus does.

    A conversation also has ``messages``, each with "role" and "content"; its ``text`` is their contents, joined by line
    ends.
    """

    id: str
    text: str
    messages: tuple[Message, ...] | None = None


def as_document(name: str, value: Any) -> Document | None:
    """``value``, a text or a list of messages, as a document with the id ``name``; None if it is neither."""
    if isinstance(value, str):
        return Document(name, value)
    if not isinstance(value, list) or not _is_conversation(value):
        return None
    messages = tuple({"role": one["role"], "content": one["content"]} for one in value)
    return Document(name, "\n".join(message["content"] for message in messages), messages)


def _is_conversation(value: list[Any]) -> bool:
    return bool(value) and all(
        isinstance(one, dict) and isinstance(one.get("role"), str) and isinstance(one.get("content"), str)
        for one in value
    )


def check_unicode(document: Document, place: str) -> None:
    """Refuse text that no tokenizer takes.

    Raises:
        CalibrantError: a surrogate is not part of a pair; the message begins with ``place``.
    """
    try:
        document.text.encode()
    except UnicodeEncodeError as error:
        raise CalibrantError(f"{place}: text with half of a surrogate pair, which is not Unicode") from error
