"""Regular expressions of a recipe, matched within a bounded time: recipes may come from strangers."""

import itertools
import math
import re
import time
from collections.abc import Sequence

import regex

from calibrant.errors import CalibrantError, first_line

MATCHING_SECONDS = 2.0
"""Time for all matches of one recipe; ordinary expressions need a thousandth of it on a thousand names."""

MOST_EXPRESSIONS = 100
_LONGEST = 1000
_DEEPEST = 50
_MOST_COPIES = 10_000
_COUNTS = re.compile(r"\{(\d*),?(\d*)\}")


def check_expression(expression: str) -> None:
    """Refuse what is no regular expression of Python, and what the matcher would need much memory for.

    Raises:
        ValueError: a sentence that names the expression.
    """
    shown = expression if len(expression) <= 100 else f"{expression[:100]}..."
    if len(expression) > _LONGEST:
        raise ValueError(f"{shown!r} has {len(expression)} characters; at most {_LONGEST} are read")
    depths = itertools.accumulate((character == "(") - (character == ")") for character in expression)
    if max(depths, default=0) > _DEEPEST:
        raise ValueError(f"{shown!r} is nested too deep, with more than {_DEEPEST} open groups")
    try:
        re.compile(expression)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{shown!r} is not a regular expression ({first_line(error)})") from error
    # The matcher repeats a counted part in memory, nested ones once for each product of their counts.
    copies = math.prod(max(1, *(int(count or 0) for count in found)) for found in _COUNTS.findall(expression))
    if copies > _MOST_COPIES:
        raise ValueError(f"{shown!r} counts repetitions up to more than {_MOST_COPIES}; write * or + instead")
    try:
        regex.compile(expression)
    except (regex.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{shown!r} is not an expression that can be matched ({first_line(error)})") from error


class Expressions:
    """Expressions that ``check_expression`` accepts, with one limit of time for all their matches.

    Args:
        expressions: the expressions.
        origin: the recipe's file or name, for messages.
    """

    def __init__(self, expressions: Sequence[str], origin: str) -> None:
        self._compiled = {expression: regex.compile(expression) for expression in expressions}
        self._origin = origin
        self._left = MATCHING_SECONDS
        self._found: dict[tuple[str, str], bool] = {}

    def finds(self, expression: str, text: str) -> bool:
        """Whether ``expression`` matches somewhere in ``text``.

        Raises:
            CalibrantError: matching takes too long.
        """
        if (expression, text) not in self._found:
            begin = time.perf_counter()
            try:
                match = self._compiled[expression].search(text, timeout=max(self._left, 0.001))
            except TimeoutError as error:
                raise CalibrantError(
                    f"{self._origin}: ignore: {expression!r} takes longer than {MATCHING_SECONDS:g} s to match with "
                    "names of layers; write it without repetitions of repetitions"
                ) from error
            self._left -= time.perf_counter() - begin
            self._found[expression, text] = match is not None
        return self._found[expression, text]
