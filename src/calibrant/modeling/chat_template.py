"""A tokenizer's chat template, as transformers' ``apply_chat_template`` uses it."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import transformers

from calibrant.errors import CalibrantError, first_line
from calibrant.hashing import sha256_bytes
from calibrant.modeling.template_process import DATE, LimitError, RefusedError, template_process

__all__ = ["DATE", "ChatTemplate", "RefusedError"]
_PROBE = "some text"
# Every such conversation takes seconds.
_MOST_OVER_LIMITS_IN_A_ROW = 3


class ChatTemplate:
    """The template of ``tokenizer``.

    It is rendered in a process of its own, since a stranger's template may never end. Functions that ask for the
    date get ``DATE``.
    """

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._over_limits_in_a_row = 0

    @cached_property
    def sha256(self) -> str:
        """Hash of the template's text."""
        return sha256_bytes(str(self._tokenizer.chat_template).encode())

    @cached_property
    def takes_parts(self) -> bool:
        """Whether a message's content may be a list of text parts; other templates would print the list as code."""
        text = self._probed([{"type": "text", "text": _PROBE}])
        return _PROBE in text and "'text'" not in text and '"text"' not in text

    @cached_property
    def takes_only_parts(self) -> bool:
        """Whether a message's content must be a list of text parts; these templates leave out or refuse a text."""
        return self.takes_parts and _PROBE not in self._probed(_PROBE)

    def _probed(self, content: Any) -> str:
        """A message with this content as the template writes it; "" if refused."""
        try:
            return self._rendered([{"role": "user", "content": content}], None, False)
        except RefusedError:
            return ""
        except LimitError as error:
            raise self._unusable(error) from error

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None = None,
        generation_prompt: bool = False,
    ) -> str:
        """The conversation as one text.

        Args:
            messages: JSON objects with a "role"; keys of null have been dropped, as transformers drops them.
            tools: descriptions of functions.
            generation_prompt: end with the beginning of an assistant's message.

        Raises:
            RefusedError: the template does not take this conversation, or takes too much time or memory for it.
            CalibrantError: there is no template, or it takes too much time or memory for several in a row.
        """
        try:
            text = self._rendered(messages, tools, generation_prompt)
        except LimitError as error:
            self._over_limits_in_a_row += 1
            if self._over_limits_in_a_row >= _MOST_OVER_LIMITS_IN_A_ROW:
                raise self._unusable(error) from error
            raise RefusedError(str(error)) from error
        self._over_limits_in_a_row = 0
        return text

    def _unusable(self, error: LimitError) -> CalibrantError:
        name = self._tokenizer.name_or_path
        return CalibrantError(f"{f'{name}: ' * bool(name)}the tokenizer's chat template cannot be used: {error}")

    def _rendered(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None, generation_prompt: bool
    ) -> str:
        described = None if tools is None else list(tools)
        try:
            template = self._tokenizer.get_chat_template(tools=described)
        except ValueError as error:
            raise CalibrantError(
                f"the corpus contains conversations, but the tokenizer has no chat template ({first_line(error)})"
            ) from error
        return template_process().render(
            {
                **self._tokenizer.special_tokens_map,
                "conversations": [list(messages)],
                "tools": described,
                "chat_template": template,
                "add_generation_prompt": generation_prompt,
            }
        )
