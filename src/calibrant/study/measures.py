"""How readers know the measures."""

_NAMES = {
    "kl": "KL",
    "same_top": "same top token",
    "output_bytes": "output size in bytes",
    "seconds": "seconds of compression",
    "set_seconds": "seconds to make the set",
}


# Other measures are counts, shares, ratios, or say their unit in their name.
_UNITS = {"kl": "nats per token", "log_perplexity_ratio": "nats per token"}


def unit_of(measure: str) -> str | None:
    """The unit of a measure, None if its name says it or it has none."""
    return _UNITS.get(measure)


def measure_name(measure: str, on: str = "") -> str:
    """The name of a measure, and of the text or task that it was measured on."""
    return f"{_NAMES.get(measure, measure.replace('_', ' '))}{f' on {on}' if on else ''}"
