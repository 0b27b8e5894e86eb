"""What was seen of an output in an engine, as records keep it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Proof:
    """What was seen of a model in an engine.

    Attributes:
        engine: its name.
        version: its version; of llama.cpp that of the package xllamacpp.
        dtype: what it computed in.
        tokens: positions at which log-probabilities were compared.
        difference, largest, allowed, same_tokens, margin, choice, unrounded: as in ``Agreement``, in nats.
        new_tokens: tokens that it wrote.
        kl: the least that the divergence of its next tokens from the original's can be, in nats a token; None without
            an original.
        load_seconds: seconds until it was ready.
        tokens_per_second: when it wrote.
        peak_bytes: memory of its largest process.
        agrees: whether it computes what is stored.
        disagreement: why not, as a clause; empty if it does.
    """

    engine: str
    version: str
    dtype: str
    tokens: int
    difference: float
    largest: float
    allowed: float
    same_tokens: int
    margin: float
    choice: float
    unrounded: float
    new_tokens: int
    kl: float | None
    load_seconds: float
    tokens_per_second: float
    peak_bytes: int
    agrees: bool
    disagreement: str
