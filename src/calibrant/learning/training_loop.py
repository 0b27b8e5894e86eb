"""Steps, looks at what was held out, an early stop, a journal: whatever is trained."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from tensorboardX import SummaryWriter

from calibrant.compression.recipe import Training
from calibrant.errors import CalibrantError
from calibrant.learning.journal import CURVES, Journal
from calibrant.progress import Progress

# A journal holds weights and moments of every parameter, which takes seconds to write for a small model (ours).
_JOURNAL_SECONDS = 300.0
_NAME = "steps"


class Lesson(Protocol):
    """What is trained, and by what."""

    @property
    def learned(self) -> Sequence[torch.Tensor]:
        """The parameters that are the result."""

    def step(self, number: int, rate: float) -> dict[str, float]:
        """One update, at ``rate`` of the learning rate; numbers for the curves. Depends on nothing but the state."""

    def held_out(self) -> float:
        """Loss on what is not trained on."""

    def sharpness(self) -> float | None:
        """How much larger that is a fixed distance away in weights, where it rises most; None if no weight learns."""

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on."""

    def load(self, state: dict[str, Any]) -> None:
        """Inverse of ``state``."""


@dataclass(frozen=True)
class Trained:
    """How a training went.

    ``looks``: the held-out loss by step; ``best`` is the step whose parameters were taken, ``sharpness`` theirs.
    ``loss`` is the mean of the last ``look`` steps' training loss.
    """

    looks: dict[int, float]
    best: int
    steps: int
    loss: float
    sharpness: float | None

    def describe(self) -> dict[str, Any]:
        """For the record."""
        held_out = {str(step): value for step, value in self.looks.items()}
        return {
            "held_out": held_out,
            "best": self.best,
            "steps": self.steps,
            "loss": self.loss,
            "sharpness": self.sharpness,
        }

    def sentence(self) -> str:
        """For people."""
        return (
            f"trained for {self.steps} steps: held-out loss {self.looks[0]:.4g} before, "
            f"{self.looks[self.best]:.4g} after step {self.best}, which was taken"
        )


def train(lesson: Lesson, options: Training, journal: Journal, progress: Progress) -> Trained:
    """Train, and leave the parameters of least held-out loss in ``lesson``.

    Goes on from ``journal`` and writes to it now and then; the result is that of an uninterrupted training.

    Raises:
        CalibrantError: the loss is not finite.
    """
    found = journal.read(_NAME)
    if found is None:
        looks = {0: _finite(lesson.held_out(), 0)}
        done, best, kept, losses = 0, 0, _copy(lesson.learned), list[float]()
    else:
        done, best, looks, kept, losses = (found[key] for key in ("done", "best", "looks", "kept", "losses"))
        lesson.load(found["lesson"])
        progress.note(f"training goes on after step {done}, from {journal.folder}")
    written = time.monotonic()
    with (
        SummaryWriter(str(journal.opened() / CURVES), purge_step=done + 1 if done else None) as curves,
        progress.task("training", options.steps - done) as task,
    ):
        for number in range(done, options.steps):
            rate = 0.5 * (1 + math.cos(math.pi * number / options.steps))
            numbers = lesson.step(number, rate)
            for name, value in numbers.items():
                curves.add_scalar(name, value, number + 1)
            losses = [*losses, numbers["loss"]][-options.look :]
            done = number + 1
            task.advance()
            if done % options.look == 0 or done == options.steps:
                looks[done] = _finite(lesson.held_out(), done)
                curves.add_scalar("held_out", looks[done], done)
                if looks[done] < looks[best]:
                    best, kept = done, _copy(lesson.learned)
                elif done - best >= options.patience * options.look:
                    break
            if time.monotonic() - written > _JOURNAL_SECONDS:
                state = {"done": done, "best": best, "looks": looks, "kept": kept, "losses": losses}
                journal.write(_NAME, {**state, "lesson": lesson.state()})
                written = time.monotonic()
    with torch.no_grad():
        for parameter, best_value in zip(lesson.learned, kept, strict=True):
            parameter.copy_(best_value)
    return Trained(looks, best, done, sum(losses) / len(losses), lesson.sharpness())


def _copy(parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


def _finite(value: float, step: int) -> float:
    if not math.isfinite(value):
        raise CalibrantError(
            f"the held-out loss is not finite after step {step}; lower the learning rate, or check the model"
        )
    return value
