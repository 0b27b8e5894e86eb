"""Conversations as token ids: the tokenizer's chat template, and which tokens an assistant wrote."""

from collections.abc import Sequence
from typing import Any

from calibrant.calibration.document import Document, Message
from calibrant.errors import CalibrantError, first_line
from calibrant.hashing import sha256_bytes
from calibrant.modeling.tokenizer import Tokenizer

ASSISTANT = "assistant"


def encode_documents(documents: Sequence[Document], tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of every document; conversations go through the chat template.

    Raises:
        CalibrantError: the tokenizer has no template, or it does not take a conversation.
    """
    plain = iter(tokenizer.encode_batch([document.text for document in documents if document.messages is None]))
    return [
        next(plain) if document.messages is None else _templated(tokenizer, document.messages, False)
        for document in documents
    ]


def assistant_mask(document: Document, ids: list[int], tokenizer: Tokenizer) -> list[bool]:
    """Whether each of ``ids``, the document's tokens, belongs to an assistant's message or to the template's end of it.

    An assistant's message is the text that the template adds to the conversation before it, followed by the template's
    generation prompt (ours; docs/methods.md "Ours").

    Raises:
        CalibrantError: the document is no conversation, or later messages change how the template writes earlier ones.
    """
    if document.messages is None:
        raise CalibrantError(f"{document.id}: a text, not a conversation, so no assistant wrote part of it")
    mask = [False] * len(ids)
    for number, message in enumerate(document.messages):
        if message["role"] == ASSISTANT:
            before = _templated(tokenizer, document.messages[:number], True) if number else []
            after = _templated(tokenizer, document.messages[: number + 1], False)
            if after[: len(before)] != before or ids[: len(after)] != after:
                raise CalibrantError(
                    f"{document.id}: the chat template writes earlier messages differently when later ones follow, "
                    'so the assistant\'s tokens cannot be found; use `mask="all"`'
                )
            mask[len(before) : len(after)] = [True] * (len(after) - len(before))
    return mask


def template_sha256(tokenizer: Tokenizer) -> str:
    """Hash of the chat template's text."""
    return sha256_bytes(str(tokenizer.hf.chat_template).encode())


def _templated(tokenizer: Tokenizer, messages: Sequence[Message], generation_prompt: bool) -> list[int]:
    if tokenizer.hf.chat_template is None:
        raise CalibrantError("the corpus contains conversations, but the tokenizer has no chat template")
    render: Any = tokenizer.hf.apply_chat_template
    try:
        text = str(render(list(messages), tokenize=False, add_generation_prompt=generation_prompt))
    except Exception as error:  # templates raise errors of any class
        raise CalibrantError(f"the chat template refuses the conversations ({first_line(error)})") from error
    return tokenizer.encode(text)
