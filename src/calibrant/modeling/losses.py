"""Losses of next tokens and of classes, a few positions at a time: negative log-likelihood and divergence.

Logits of a whole vocabulary are made float32 (float64 if they are float64) for a few positions only, so that what they
are turned into stays in the cache. A position's value does not depend on how positions are divided.
"""

from collections.abc import Iterator
from typing import Any

import torch
import transformers

from calibrant.errors import CalibrantError

_POSITIONS = 32


def negative_log_likelihoods(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """``-log p(target)`` in nats, ``[positions]``, of logits ``[positions, vocabulary]`` and int64 targets."""
    found = [-_log_softmax(logits[part]).gather(1, targets[part, None])[:, 0] for part in _parts(len(targets))]
    return torch.cat(found) if found else logits.new_empty(0, dtype=torch.float32)


@torch.inference_mode()
def row_losses(model: transformers.PreTrainedModel, tokens: torch.Tensor, mask: torch.Tensor) -> list[float]:
    """Mean negative log-likelihood (nats) of the counted tokens of each row, each given the tokens before it.

    ``tokens`` int ``[rows, length]``, ``mask`` bool of that shape; the first token of a row has no predecessor and
    does not count. Rows run one at a time, so a row's loss does not depend on its neighbours. NaN for a row without a
    counted token.

    Raises:
        CalibrantError: the model gives values that are not numbers.
    """
    losses = []
    for row, counted in zip(tokens.long(), mask.bool(), strict=True):
        ids, wanted = row[None].to(model.device), counted[1:].to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        each = negative_log_likelihoods(logits, ids[0, 1:])
        if bool(each.isnan().any()):
            raise CalibrantError("the model gives values that are not finite on the text; its weights may be damaged")
        count = int(wanted.sum())
        losses.append(float(each[wanted].double().sum()) / count if count else float("nan"))
    return losses


def divergences(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """``KL(teacher || student)`` in nats, ``[..]``, of logits ``[.., classes]``, with gradients to both.

    float32; float64 for float64 logits.
    """
    classes = teacher.shape[-1]
    each: torch.Tensor = _Divergence.apply(teacher.reshape(-1, classes), student.reshape(-1, classes))  # type: ignore[no-untyped-call]  # torch's own
    return each.view(teacher.shape[:-1])


class _Divergence(torch.autograd.Function):
    """Keeps only the logits: the backward pass computes probabilities again, a few positions at a time."""

    @staticmethod
    def forward(ctx: Any, teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(teacher, student)
        found = [_divergence(teacher[part], student[part]) for part in _parts(len(teacher))]
        return torch.cat(found) if found else teacher.new_empty(0, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        teacher, student = ctx.saved_tensors
        of_teacher, of_student = (
            torch.empty_like(logits) if needed else None
            for logits, needed in zip((teacher, student), ctx.needs_input_grad, strict=True)
        )
        for part in _parts(len(teacher)):
            log_p, log_q = _log_softmax(teacher[part]), _log_softmax(student[part])
            p, weight = log_p.exp(), gradients[0][part, None]
            if of_student is not None:
                of_student[part] = (log_q.exp() - p).mul_(weight)
            if of_teacher is not None:
                log_ratio = log_p.sub_(log_q)
                of_teacher[part] = log_ratio.sub_((p * log_ratio).sum(-1, keepdim=True)).mul_(p).mul_(weight)
        return of_teacher, of_student


def _divergence(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    log_p, log_q = _log_softmax(teacher), _log_softmax(student)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _parts(positions: int) -> Iterator[slice]:
    return (slice(begin, begin + _POSITIONS) for begin in range(0, positions, _POSITIONS))


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits if logits.dtype is torch.float64 else logits.float(), -1)
