"""How far a student is from its teacher: of next tokens, or of classes."""

from collections.abc import Iterator
from typing import Any

import torch

# Positions at a time: what a vocabulary's worth of logits is turned into should be small enough to be used again.
_POSITIONS = 32


def divergences(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """``KL(teacher || student)`` in nats, ``[..]``, of logits ``[.., classes]``; float32, with gradients to both."""
    classes = teacher.shape[-1]
    each: torch.Tensor = _Divergence.apply(teacher.reshape(-1, classes), student.reshape(-1, classes))  # type: ignore[no-untyped-call]  # torch's own
    return each.view(teacher.shape[:-1])


class _Divergence(torch.autograd.Function):
    """Keeps nothing but the logits: probabilities are computed again, a few positions at a time."""

    @staticmethod
    def forward(ctx: Any, teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(teacher, student)
        found = torch.empty(len(teacher), dtype=torch.float32, device=teacher.device)
        for part in _parts(len(teacher)):
            log_p, log_q = _log_softmax(teacher[part]), _log_softmax(student[part])
            found[part] = (log_p.exp() * (log_p - log_q)).sum(-1)
        return found

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
                apart = log_p.sub_(log_q)
                of_teacher[part] = apart.sub_((p * apart).sum(-1, keepdim=True)).mul_(p).mul_(weight)
        return of_teacher, of_student


def _parts(positions: int) -> Iterator[slice]:
    return (slice(begin, begin + _POSITIONS) for begin in range(0, positions, _POSITIONS))


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits.float(), -1)
