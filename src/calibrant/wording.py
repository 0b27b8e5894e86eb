"""Parts of sentences."""

from collections.abc import Sequence


def listed(names: Sequence[str]) -> str:
    """The names, of which there is at least one, as "a", "a and b" or "a, b and c"."""
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]


def and_more(count: int, what: str = "layer") -> str:
    """ " and 3 more layers", or nothing if there are none."""
    return f" and {count} more {what}{'s' if count > 1 else ''}" if count > 0 else ""
