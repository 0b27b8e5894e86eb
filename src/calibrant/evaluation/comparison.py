"""Perplexity of a model and divergence of its next-token distributions from the original model's."""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
import transformers

from calibrant.errors import CalibrantError
from calibrant.evaluation.original import Original, window_logits
from calibrant.evaluation.tasks.results import TaskComparison, TaskResult
from calibrant.evaluation.text import EvaluationText
from calibrant.hashing import sha256_bytes
from calibrant.modeling.losses import divergences, negative_log_likelihoods
from calibrant.progress import Progress

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
    ``kl_by_window`` are the means of the windows, for paired comparisons of compressed models.
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
    kl_by_window: tuple[float, ...]


@dataclass(frozen=True)
class Evaluation:
    """Results of one model.

    ``tokens`` is the number of predicted tokens, ``tokens_dropped`` that of the text's tokens outside the windows used;
    without a text all numbers are 0 and ``perplexity`` is None. ``original`` and ``divergence`` are None if there was
    no original to compare with. ``wikitext`` is the same for WikiText by the papers' protocol. ``tasks`` are the
    model's results, ``original_tasks`` the original's, ``task_comparisons`` the two paired. ``loss_by_window``
    are mean negative log-likelihoods in nats. ``windows_sha256`` identifies the text: evaluations with the same one are
    of the same tokens.
    """

    windows: int
    length: int
    tokens: int
    tokens_dropped: int
    perplexity: Perplexity | None = None
    loss_by_window: tuple[float, ...] = ()
    original: Perplexity | None = None
    divergence: Divergence | None = None
    wikitext: "Evaluation | None" = None
    tasks: tuple[TaskResult, ...] = ()
    original_tasks: tuple[TaskResult, ...] = ()
    task_comparisons: tuple[TaskComparison, ...] = ()
    windows_sha256: str = ""


def evaluate_models(
    model: transformers.PreTrainedModel,
    original: Original | None,
    text: EvaluationText,
    progress: Progress,
) -> Evaluation:
    """Run ``model`` over the windows of ``text``, one at a time, and compare it with ``original``.

    Statistics are float32.

    Raises:
        CalibrantError: a model gives values that are not finite.
    """
    windows = text.windows
    losses, original_losses, kl, same_top = [], [], [], []
    with progress.task("evaluating", len(windows), "windows") as task, torch.inference_mode():
        for index, window in enumerate(windows):
            logits, targets = window_logits(model, window), window[1:].to(model.device)
            losses.append(_mean(_finite(negative_log_likelihoods(logits, targets), "the model")))
            if original is not None:
                reference = original.logits(index, window).to(model.device)
                original_losses.append(_mean(_finite(negative_log_likelihoods(reference, targets), "the original")))
                kl.append(_finite(divergences(reference, logits), "the divergence").double().cpu().numpy())
                same_top.append((reference.argmax(-1) == logits.argmax(-1)).cpu().numpy())
            task.advance()
    loss, original_loss = np.array(losses), np.array(original_losses)
    sizes = (len(windows), windows.shape[1], windows.shape[0] * (windows.shape[1] - 1), text.tokens_dropped)
    found = Evaluation(*sizes, _perplexity(loss), tuple(losses), windows_sha256=sha256_bytes(windows.numpy().tobytes()))
    if original is None:
        return found
    divergence = _divergence(np.stack(kl), np.stack(same_top), loss, original_loss)
    return replace(found, original=_perplexity(original_loss), divergence=divergence)


def _finite(values: torch.Tensor, what: str) -> torch.Tensor:
    """``values``, unless one is not finite: such a model agrees with nothing, not even with itself."""
    if not bool(values.isfinite().all()):
        raise CalibrantError(f"{what} gives values that are not finite on the text; its weights may be damaged")
    return values


def _mean(losses: torch.Tensor) -> float:
    return float(losses.double().sum()) / len(losses)


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
        kl_by_window=tuple(kl.mean(1).tolist()),
    )
