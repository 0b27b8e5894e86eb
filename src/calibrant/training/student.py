"""Training of a rounded model on its teacher's logits or on text: losses, sharpness-aware steps, held-out loss."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional as F

from calibrant.methods.training import OnText, TrainingOptions
from calibrant.modeling.losses import divergences
from calibrant.modeling.model_head import Inputs
from calibrant.modeling.token_rows import TokenRows
from calibrant.training.rounded_model import Learner
from calibrant.training.sharpness import at_worst_nearby, gradient_norm
from calibrant.training.teacher import Teacher, computing, keep_head_in_float32, model_logits

# The gradients' global norm is clipped to this value (ours).
LARGEST_GRADIENT = 1.0
# Radius of the reported sharpness; does not depend on the training's ``sam_rho`` (ours).
_MEASURED_RADIUS = 0.05


class Student:
    """A rounded model, its teacher and the optimizer of its trained parameters.

    Args:
        learner: the rounded model.
        teacher: gives the original model's logits.
        options: the recipe's training options.
        watched: the held-out token ids ``[rows, length]`` and which of them count; never trained on.
        dtype: dtype of matrix products.
        causal: whether tokens attend only to earlier ones; if not, tokens after a row's last counted one are masked.
    """

    def __init__(
        self,
        learner: Learner,
        teacher: Teacher,
        options: TrainingOptions,
        watched: TokenRows,
        dtype: torch.dtype,
        causal: bool,
    ) -> None:
        self.learner, self._teacher, self._options, self._watched = learner, teacher, options, watched
        self._dtype, self._causal = dtype, causal
        self._on_text = isinstance(options, OnText) and options.objective == "text"
        groups = [
            {"params": parameters, "rate": options.learning_rate * factor} for parameters, factor in learner.groups
        ]
        self._optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, weight_decay=0.0)
        keep_head_in_float32(learner.model)

    @property
    def learned(self) -> list[torch.Tensor]:
        """All trained parameters."""
        return [parameter for parameters, _ in self.learner.groups for parameter in parameters]

    def answer(self, inputs: Inputs) -> torch.Tensor:
        """The student's logits."""
        return model_logits(self.learner.model, inputs, self._dtype)

    def target(self, inputs: Inputs) -> torch.Tensor:
        """The teacher's logits."""
        return self._teacher.logits(inputs)

    def computing(self) -> torch.autocast:
        """Autocast context that computes matrix products in the run's dtype."""
        return computing(self.learner.model.device, self._dtype)

    def parts(self, rows: int, length: int) -> Iterator[slice]:
        """Micro-batches of ``rows`` rows of ``length`` tokens, as slices."""
        size = self._options.micro_batch(length, int(self.learner.model.config.get_text_config().vocab_size))
        return (slice(begin, min(begin + size, rows)) for begin in range(0, rows, size))

    def descend(self, rate: float, loss: Callable[[], float]) -> dict[str, float]:
        """Take one optimizer step at ``rate`` times the learning rate, and return the numbers for the curves.

        ``loss`` accumulates gradients in the parameters and returns the loss. Sharpness is the increase of the loss at
        distance ``sam_rho`` along the gradient.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = group["rate"] * rate
        self._optimizer.zero_grad()
        numbers = {"loss": loss()}
        if self._options.sam_rho:
            with at_worst_nearby(self.learner.weights, self._options.sam_rho):
                self._optimizer.zero_grad()
                numbers["sharpness"] = loss() - numbers["loss"]
        numbers["gradient"] = float(gradient_norm(self.learned))
        torch.nn.utils.clip_grad_norm_(self.learned, LARGEST_GRADIENT)
        self._optimizer.step()
        return numbers

    def losses(self, rows: TokenRows) -> torch.Tensor:
        """Divergence from the teacher, or negative log-likelihood of the text, by position.

        ``[rows, length]`` (text: ``[rows, length - 1]``), 0 at tokens that do not count; ``[rows]`` for classifiers.
        """
        ids, counted = rows
        inputs = rows.model_inputs(self._causal)
        answer = self.answer(inputs)
        if self._on_text:
            each = F.cross_entropy(answer[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
            return each * counted[:, 1:]
        with torch.no_grad():
            target = self.target(inputs)
        each = divergences(target, answer)
        return each * counted if each.ndim == 2 else each

    def positions(self, losses: torch.Tensor, counted: torch.Tensor) -> int:
        """Number of positions to average over in ``counted``, which may cover more rows than ``losses`` does."""
        if losses.ndim == 1:
            return len(counted)
        return int(counted[:, 1:].sum() if self._on_text else counted.sum())

    @torch.no_grad()
    def held_out(self) -> float:
        """Mean loss of the held-out rows."""
        ids, counted = self._watched
        total, positions = 0.0, 0
        for part in self.parts(*ids.shape):
            losses = self.losses(TokenRows(ids[part], counted[part]))
            total += float(losses.double().sum())
            positions += self.positions(losses, counted[part])
        return total / positions

    def sharpness(self) -> float | None:
        """Sharpness on the first held-out micro-batch at a fixed radius; None if no weights are trained."""
        if not self.learner.weights:
            return None
        ids, counted = self._watched
        part = next(self.parts(*ids.shape))
        rows = TokenRows(ids[part], counted[part])
        self._optimizer.zero_grad()
        here = self.losses(rows)
        positions = self.positions(here, rows[1])
        (here.sum() / positions).backward()
        with at_worst_nearby(self.learner.weights, _MEASURED_RADIUS), torch.no_grad():
            there = self.losses(rows).sum()
        self._optimizer.zero_grad()
        return float(there - here.detach().sum()) / positions

    def state(self) -> dict[str, Any]:
        """Trained parameters and optimizer state."""
        learned = [parameter.detach() for parameter in self.learned]
        return {"learned": learned, "optimizer": self._optimizer.state_dict()}

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        """Restore a ``state``."""
        for parameter, value in zip(self.learned, state["learned"], strict=True):
            parameter.copy_(value)
        self._optimizer.load_state_dict(state["optimizer"])
