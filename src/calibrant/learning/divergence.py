"""How far a student is from its teacher: of next tokens, or of classes."""

import torch


def divergences(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """``KL(teacher || student)`` in nats, ``[..]``, of logits ``[.., classes]``."""
    log_p, log_q = torch.log_softmax(teacher.float(), -1), torch.log_softmax(student.float(), -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)
