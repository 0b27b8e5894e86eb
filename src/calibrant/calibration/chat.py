"""Conversations as token ids: the tokenizer's chat template, and which tokens an assistant wrote."""

from collections.abc import Sequence
from dataclasses import replace

from calibrant.calibration.document import Document, has_parts, joined_parts, split_into_parts
from calibrant.errors import CalibrantError
from calibrant.modeling.chat_template import RefusedError
from calibrant.modeling.tokenizer import Tokenizer

ASSISTANT, USER = "assistant", "user"


def encode_documents(documents: Sequence[Document], tokenizer: Tokenizer) -> list[list[int] | RefusedError]:
    """Token ids of every document; conversations go through the chat template.

    In place of a conversation that the template refuses stands the refusal.

    Raises:
        CalibrantError: the tokenizer has no template, or one that takes too much time or memory again and again.
    """
    plain = iter(tokenizer.encode_batch([document.text for document in documents if document.messages is None]))
    return [next(plain) if document.messages is None else _encoded(document, tokenizer) for document in documents]


def _encoded(document: Document, tokenizer: Tokenizer) -> list[int] | RefusedError:
    try:
        return _templated(tokenizer, document, None, False)
    except RefusedError as error:
        return error


def encode_prompt(document: Document, tokenizer: Tokenizer) -> list[int]:
    """Token ids of what ``document`` asks and of the template's request for an answer; none if nothing is asked.

    A text is one message of a user. Of a conversation it is all that comes before the first answer to a user, since
    whatever follows answers words that another model or a person wrote (ours).

    Raises:
        RefusedError: the template does not take these messages.
        CalibrantError: the tokenizer has no template, or one that takes too much time or memory again and again.
    """
    messages = document.messages or ({"role": USER, "content": document.text},)
    roles = [message["role"] for message in messages]
    if USER not in roles:
        return []
    asked = roles.index(USER)
    end = roles.index(ASSISTANT, asked) if ASSISTANT in roles[asked:] else len(roles)
    return _templated(tokenizer, replace(document, messages=messages), end, True)


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
            try:
                before = _templated(tokenizer, document, number, True) if number else []
                after = _templated(tokenizer, document, number + 1, False)
            except RefusedError as error:
                raise CalibrantError(
                    f"{document.id}: the chat template refuses the beginning of the conversation ({error}), "
                    'so the assistant\'s tokens cannot be found; use `mask="all"`'
                ) from error
            if after[: len(before)] != before or ids[: len(after)] != after:
                raise CalibrantError(
                    f"{document.id}: the chat template writes earlier messages differently when later ones follow, "
                    'so the assistant\'s tokens cannot be found; use `mask="all"`'
                )
            mask[len(before) : len(after)] = [True] * (len(after) - len(before))
    return mask


def _templated(tokenizer: Tokenizer, document: Document, count: int | None, generation_prompt: bool) -> list[int]:
    """Tokens of the first ``count`` messages, of all if None."""
    messages: Sequence[dict[str, object]] = (document.messages or ())[:count]
    if tokenizer.chat_template.takes_only_parts:
        messages = split_into_parts(messages)
    elif has_parts(messages) and not tokenizer.chat_template.takes_parts:
        messages = joined_parts(messages)
    return tokenizer.encode(tokenizer.chat_template.render(messages, document.tools, generation_prompt))
