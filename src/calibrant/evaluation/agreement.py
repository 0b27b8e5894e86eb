"""How far an engine is from a reference model, and how much of that its arithmetic explains."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

from calibrant.evaluation.original import window_logits
from calibrant.modeling.hooks import Hook, hooked

# Sums in another order change the inputs of a product by about this share in float32 (ours).
_FLOAT32_NOISE = 2.0**-20
# What log-probabilities that are computed in float32 may differ by, and how many times the noise seen (ours).
_FLOOR = 1e-3
_FACTOR = 4.0
# An engine that is so much nearer to the reference without rounded inputs than to the one with them rounds none (ours).
_NEARER = 0.5
# Tokens less likely than this are not looked at for the largest difference (ours).
_LIKELY = 0.01

Likeliest = list[dict[int, float]]


@dataclass(frozen=True)
class Agreement:
    """Differences of log-probabilities in nats.

    Attributes:
        difference: mean over positions of ``sum p |log p - log q|`` over the engine's likeliest tokens; p is the
            engine's probability, q the reference's.
        largest: the largest difference of a token of at least one percent.
        allowed: the largest ``difference`` that the engine's arithmetic explains.
        same_tokens: how many tokens of the engine's greedy text are the reference's choice, before the first other one.
        margin: at that one, how much likelier the reference's choice is; 0 if there is none.
        choice: the largest ``margin`` that the engine's arithmetic explains.
        unrounded: the difference from the reference that does not round inputs.
    """

    difference: float
    largest: float
    allowed: float
    same_tokens: int
    margin: float
    choice: float
    unrounded: float

    @property
    def rounds(self) -> bool:
        """Whether the engine rounds inputs if the reference does."""
        return self.difference <= _FLOOR or self.unrounded >= _NEARER * self.difference

    @property
    def disagreement(self) -> str:
        """How the engine differs from the reference by more than its arithmetic explains; empty if it does not.

        Choices may differ where both are about as likely.
        """
        if self.difference > self.allowed:
            return (
                f"log-probabilities differ by {self.difference:.3g} on average, arithmetic explains {self.allowed:.3g}"
            )
        if not self.rounds:
            return f"it rounds no inputs: {self.unrounded:.3g} off without rounding, {self.difference:.3g} with"
        if self.margin > self.choice:
            return f"it writes a token that is less likely by {self.margin:.3g}, arithmetic explains {self.choice:.3g}"
        return ""


def agreement(
    reference: transformers.PreTrainedModel,
    windows: Sequence[torch.Tensor],
    answers: Sequence[Likeliest],
    prompt: Sequence[int],
    written: Sequence[int],
    dtype: torch.dtype,
    unrounded: Sequence[torch.Tensor],
    unpacked: Sequence[torch.Tensor] | None,
) -> Agreement:
    """Compare an engine's ``answers`` on ``windows`` and its greedy text with ``reference``, which rounds as it does.

    What its arithmetic in ``dtype`` explains is seen by running the reference again, with the inputs of every linear
    changed at random by as much as that dtype, or sums in another order, may change them. ``unrounded`` are
    ``log_probabilities`` of the reference before it rounds inputs; ``unpacked`` the same with weights as an engine
    unpacks them, None if it does not: how far these are from ``unrounded`` is allowed too.
    """
    logs = log_probabilities(reference, windows)
    with torch.inference_mode():
        with _noise(reference, max(_FLOAT32_NOISE, torch.finfo(dtype).eps / 2)):
            noisy = [_logs(reference, window) for window in windows]
        text = torch.tensor([*prompt, *written])
        choices = _logs(reference, text)[len(prompt) - 1 :]
    apart = [_distance(answer, log) for answer, log in zip(answers, logs, strict=True)]
    noise = [_distance(answer, log) for answer, log in zip(_named(noisy, answers), logs, strict=True)]
    allowed = _FLOOR + _FACTOR * _mean([one for one, _ in noise])
    if unpacked is not None:
        moved = zip(_named(unpacked, answers), unrounded, strict=True)
        allowed += _mean([_distance(answer, log)[0] for answer, log in moved])
    gaps = [float(log.max() - log[token]) for log, token in zip(choices, written, strict=True)]
    same = next((place for place, gap in enumerate(gaps) if gap > 0), len(gaps))
    return Agreement(
        difference=_mean([one for one, _ in apart]),
        largest=max(largest for _, largest in apart),
        allowed=allowed,
        same_tokens=same,
        margin=gaps[same] if same < len(gaps) else 0.0,
        choice=2 * max(_FACTOR * max(largest for _, largest in noise), allowed),
        unrounded=_mean([_distance(answer, log)[0] for answer, log in zip(answers, unrounded, strict=True)]),
    )


def log_probabilities(model: transformers.PreTrainedModel, windows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Of each window log-probabilities (float64 ``[length - 1, vocabulary]``) of the next tokens."""
    with torch.inference_mode():
        return [_logs(model, window) for window in windows]


def divergence_from(
    original: transformers.PreTrainedModel, windows: Sequence[torch.Tensor], answers: Sequence[Likeliest]
) -> float:
    """Mean KL divergence of the engine's next tokens from the original's, in nats a token.

    The tokens that the engine named count each, all others as one, so it is the least that the divergence can be.
    """
    values = []
    with torch.inference_mode():
        for window, answer in zip(windows, answers, strict=True):
            for log, said in zip(_logs(original, window), answer, strict=True):
                ids, theirs = torch.tensor(list(said)), torch.tensor(list(said.values()), dtype=torch.float64)
                ours = log[ids]
                rest, other = 1 - float(ours.exp().sum()), 1 - float(theirs.exp().sum())
                kl = float((ours.exp() * (ours - theirs)).sum())
                tiny = torch.finfo(torch.float64).tiny
                values.append(kl + max(rest, 0.0) * float(torch.tensor(max(rest, tiny) / max(other, 1e-9)).log()))
    return _mean(values)


def _logs(model: transformers.PreTrainedModel, window: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (float64) at every position but the last."""
    return window_logits(model, window).double().log_softmax(-1).cpu()


def _named(logs: Sequence[torch.Tensor], answers: Sequence[Likeliest]) -> list[Likeliest]:
    """Of each window the log-probabilities of the tokens that its answer names."""
    return [
        [{token: float(log[token]) for token in said} for log, said in zip(window, answer, strict=True)]
        for window, answer in zip(logs, answers, strict=True)
    ]


def _distance(answer: Likeliest, logs: torch.Tensor) -> tuple[float, float]:
    """Mean weighted difference, and the largest one of a likely token."""
    means, largest = [], 0.0
    for said, log in zip(answer, logs, strict=True):
        theirs = torch.tensor(list(said.values()), dtype=torch.float64)
        apart = (theirs - log[torch.tensor(list(said))]).abs()
        means.append(float((theirs.exp() * apart).sum()))
        largest = max(largest, *apart[theirs.exp() >= _LIKELY].tolist(), 0.0)
    return _mean(means), largest


@contextmanager
def _noise(model: nn.Module, share: float) -> Iterator[None]:
    """Change the inputs of every linear by a random share, before other hooks see them."""
    generator = torch.Generator().manual_seed(0)

    def change(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        factor = 1 + share * torch.randn(args[0].shape, generator=generator)
        return (args[0] * factor.to(args[0].device, args[0].dtype), *args[1:]), kwargs

    hooks: list[tuple[nn.Module, Hook]] = [(one, change) for one in model.modules() if isinstance(one, nn.Linear)]
    with hooked(hooks, first=True):
        yield


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
