"""Self-calibration: the model writes its own calibration text from BOS alone (arXiv 2410.17170 §3)."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import transformers

from calibrant.calibration.calibration_set import CalibrationSet, Manifest
from calibrant.calibration.sources.english import english_beginnings
from calibrant.calibration.sources.text_generation import KeptRows, Sampling, compute_place, write_rows
from calibrant.errors import CalibrantError
from calibrant.modeling.tokenizer import Tokenizer
from calibrant.progress import Progress
from calibrant.randomness import make_rng

FirstTokens = Literal["any", "english"]


@dataclass(frozen=True)
class TemperatureSchedule:
    """Temperatures of a generation: linear from ``initial`` to ``final`` over ``steps`` steps, then ``final``.

    ``t_i = initial + (i / steps) (final - initial)`` for ``1 <= i <= steps`` (arXiv 2410.17170 §3.2); with
    ``steps = 0`` all are ``final``. Temperatures below 1e-4 take the most likely token (ours).

    Raises:
        CalibrantError: a number is negative or not finite.
    """

    initial: float = 1.0
    final: float = 1.0
    steps: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.initial < math.inf and 0 <= self.final < math.inf and self.steps >= 0):
            raise CalibrantError("temperatures must be finite and not negative, like temperature steps")

    @property
    def parameters(self) -> dict[str, float]:
        """The schedule as manifests record it."""
        return {
            "temperature_initial": self.initial,
            "temperature_final": self.final,
            "temperature_steps": self.steps,
        }

    def table(self, length: int) -> torch.Tensor:
        """Temperatures of steps 1 ... ``length`` as float64 ``[length]``."""
        step = torch.arange(1, length + 1, dtype=torch.float64)
        share = torch.clamp(step / self.steps, max=1.0) if self.steps else torch.ones(length, dtype=torch.float64)
        return self.initial + share * (self.final - self.initial)


def generate_self_calibration(
    model: transformers.PreTrainedModel,
    tokenizer: Tokenizer,
    *,
    samples: int,
    length: int,
    seed: int,
    draw: int,
    schedule: TemperatureSchedule,
    first_tokens: FirstTokens,
    batch_size: int,
    progress: Progress,
    provenance: dict[str, str],
    kept: KeptRows | None = None,
) -> CalibrationSet:
    """Let ``model`` write ``samples`` rows of exactly ``length`` tokens.

    A row starts with BOS. After EOS a new, independent text begins with BOS in the same row, until the row is full; EOS
    and BOS stay in the row and count (ours). There is no top-k, top-p or penalty. ``first_tokens`` "english" restricts
    every text's first token to whole English function words, as the paper does for multilingual models with spaCy's
    stop words. ``provenance`` is recorded in the manifest; ``kept`` is that of ``write_rows``.
    """
    uniforms = np.stack([make_rng(seed, "self", draw, row).random(length) for row in range(samples)])
    first_ids = torch.tensor(english_beginnings(tokenizer)) if first_tokens == "english" else None
    sampling = Sampling(schedule.table(length), first_ids)
    start = [tokenizer.start_id]
    written = write_rows(model, tokenizer, uniforms, lambda row, text: start, sampling, batch_size, progress, kept)
    manifest = Manifest(
        strategy="self",
        parameters={
            **schedule.parameters,
            "first_tokens": first_tokens,
            "batch_size": batch_size,
            "start_token": tokenizer.start_id,
            **compute_place(model),
        },
        seed=seed,
        draw=draw,
        samples=samples,
        length=length,
        tokenizer_sha256=tokenizer.sha256,
        tokenizer_files_sha256=tokenizer.files_sha256,
        model=dict(provenance),
        counts={"generations": written.generations},
    )
    return CalibrationSet.build(written.tokens, torch.ones_like(written.tokens, dtype=torch.bool), manifest)
