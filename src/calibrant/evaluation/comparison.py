"""Perplexity of a model and divergence of its next-token distributions from the original model's."""

import math
from dataclasses import dataclass

import numpy as np
import torch
import transformers

from calibrant.evaluation.text import EvaluationText
from calibrant.progress import Progress

# Positions compared at a time; their distributions need 2 x 8 bytes x vocabulary x positions.
_POSITIONS_AT_ONCE = 128
_PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True)
class Perplexity:
    """``exp`` of the mean negative log-likelihood in nats, with a 95 % interval over windows (Student's t).

    The interval is None for a single window.
    """

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Divergence:
    """Divergence of the compressed model from the original over all predicted tokens (llama.cpp's measures).

    ``kl_mean`` is the mean of ``KL(original || compressed)`` in nats. Standard errors are over windows, since tokens of
    one window are not independent (ours). ``same_top`` is the share of positions where both models have the same most
    likely next token. ``log_ratio`` is ``log(ppl compressed / ppl original)``, paired by window, with a 95 % interval.
    Standard errors and intervals are None for a single window.
    """

    kl_mean: float
    kl_standard_error: float | None
    kl_percentiles: dict[str, float]
    kl_max: float
    same_top: float
    same_top_standard_error: float | None
    log_ratio: float
    log_ratio_low: float | None
    log_ratio_high: float | None


@dataclass(frozen=True)
class Evaluation:
    """Results of one model.

    ``tokens`` is the number of predicted tokens, ``tokens_dropped`` that of the text's tokens outside the windows used.
    ``original`` and ``divergence`` are None if there was no original to compare with.
    """

    windows: int
    length: int
    tokens: int
    tokens_dropped: int
    perplexity: Perplexity
    original: Perplexity | None = None
    divergence: Divergence | None = None


def evaluate_models(
    model: transformers.PreTrainedModel,
    original: transformers.PreTrainedModel | None,
    text: EvaluationText,
    progress: Progress,
) -> Evaluation:
    """Run both models over the windows of ``text``, one window at a time; statistics are float32."""
    windows = text.windows
    losses, original_losses, divergences, agreements = [], [], [], []
    with progress.task("evaluating", len(windows)) as task, torch.inference_mode():
        for window in windows:
            ids = window[None].to(model.device)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
            reference = None
            if original is not None:
                reference = original(input_ids=ids.to(original.device), use_cache=False).logits[0, :-1].to(model.device)
            window_loss, window_reference, kl, same = _compare(logits, reference, ids[0, 1:])
            losses.append(window_loss)
            if reference is not None:
                original_losses.append(window_reference)
                divergences.append(kl)
                agreements.append(same)
            task.advance()
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    loss = np.array(losses)
    if original is None:
        return Evaluation(len(windows), windows.shape[1], tokens, text.tokens_dropped, _perplexity(loss))
    divergence = _divergence(np.concatenate(divergences), np.concatenate(agreements), loss, np.array(original_losses))
    sizes = (len(windows), windows.shape[1], tokens, text.tokens_dropped)
    return Evaluation(*sizes, _perplexity(loss), _perplexity(np.array(original_losses)), divergence)


def _compare(
    logits: torch.Tensor, reference: torch.Tensor | None, targets: torch.Tensor
) -> tuple[float, float, np.ndarray, np.ndarray]:
    """Mean loss of both models over one window; KL and top-token agreement of each position, ``[1, positions]``.

    ``logits`` and ``reference`` are ``[positions, vocabulary]``, ``targets`` int64 ``[positions]``.
    """
    loss = reference_loss = 0.0
    divergences, agreements = [], []
    for begin in range(0, len(targets), _POSITIONS_AT_ONCE):
        part = slice(begin, begin + _POSITIONS_AT_ONCE)
        target = targets[part, None]
        log_q = torch.log_softmax(logits[part].float(), dim=-1)
        loss -= float(log_q.gather(1, target).double().sum())
        if reference is not None:
            log_p = torch.log_softmax(reference[part].float(), dim=-1)
            reference_loss -= float(log_p.gather(1, target).double().sum())
            divergences.append((log_p.exp() * (log_p - log_q)).sum(-1).double().cpu().numpy())
            agreements.append((log_p.argmax(-1) == log_q.argmax(-1)).cpu().numpy())
    count = len(targets)
    if reference is None:
        return loss / count, 0.0, np.empty(0), np.empty(0)
    return loss / count, reference_loss / count, np.concatenate(divergences)[None], np.concatenate(agreements)[None]


def _half_width(values: np.ndarray) -> float | None:
    """Half the width of the 95 % interval of the mean; ``values`` has one element per window."""
    from scipy import stats  # slow to import, and only evaluation needs it

    error = _standard_error(values)
    return None if error is None else float(stats.t.ppf(0.975, len(values) - 1)) * error


def _standard_error(by_window: np.ndarray) -> float | None:
    return float(by_window.std(ddof=1) / math.sqrt(len(by_window))) if len(by_window) > 1 else None


def _perplexity(losses: np.ndarray) -> Perplexity:
    mean, half = float(losses.mean()), _half_width(losses)
    if half is None:
        return Perplexity(_exp(mean), None, None)
    return Perplexity(_exp(mean), _exp(mean - half), _exp(mean + half))


def _exp(value: float) -> float:
    """Exponential with a clamped argument, so that a broken model gives a huge number instead of an overflow."""
    return math.exp(min(value, 700.0))


def _divergence(kl: np.ndarray, same: np.ndarray, losses: np.ndarray, original_losses: np.ndarray) -> Divergence:
    """``kl`` and ``same`` are ``[windows, tokens]``."""
    difference = losses - original_losses
    half = _half_width(difference)
    return Divergence(
        kl_mean=float(kl.mean()),
        kl_standard_error=_standard_error(kl.mean(1)),
        kl_percentiles={str(p): float(np.percentile(kl, p)) for p in _PERCENTILES},
        kl_max=float(kl.max()),
        same_top=float(same.mean()),
        same_top_standard_error=_standard_error(same.mean(1)),
        log_ratio=float(difference.mean()),
        log_ratio_low=None if half is None else float(difference.mean()) - half,
        log_ratio_high=None if half is None else float(difference.mean()) + half,
    )
