"""The training loop of every method: steps, held-out evaluation, early stopping, journal."""

import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from calibrant.errors import CalibrantError
from calibrant.journal import Journal
from calibrant.methods.training import TrainingOptions
from calibrant.progress import Progress
from calibrant.stopping import check_stop, stop_requested
from calibrant.training.student import Student

# Least interval between journal writes, and the least ratio of interval to writing time: the journal contains weights
# and moments of every trained parameter, so writing it can take long (ours).
JOURNAL_SECONDS = 30.0
JOURNAL_SHARE = 20
CURVES = "curves"
"""Subfolder of the journal for TensorBoard's files."""

NAME = "steps"
"""Name of the state in the journal."""


class TrainStep(Protocol):
    """A student and the step that trains it."""

    student: Student

    def step(self, number: int, rate: float) -> dict[str, float]:
        """Update at ``rate`` times the learning rate; return numbers for the curves.

        Depends only on the arguments and the state, so that a resumed training repeats an uninterrupted one.
        """

    def state(self) -> dict[str, Any]:
        """Everything that later steps depend on."""

    def load(self, state: dict[str, Any]) -> None:
        """Restore a ``state``."""


@dataclass(frozen=True)
class Trained:
    """Result of a training.

    ``held_out`` is the held-out loss by step; ``best`` the step whose parameters were kept; ``sharpness`` the sharpness
    at these parameters; ``loss`` the mean training loss of the last ``eval_steps`` steps, None if it was never finite.
    ``diverged`` is the step after which the held-out loss was not finite, which ended the training.
    """

    held_out: dict[int, float]
    best: int
    steps: int
    loss: float | None
    sharpness: float | None
    diverged: int | None = None

    def sentence(self) -> str:
        """One-sentence summary for the user."""
        if self.diverged is not None:
            return (
                f"training diverged by step {self.diverged}, so the values after step {self.best} were kept; lower the "
                "learning rate"
            )
        if self.best == 0:
            return (
                f"training did not help in {self.steps} steps: the held-out loss is {self.held_out[0]:.4g} before it "
                "and no lower after, so the untrained values were kept"
            )
        return (
            f"trained for {self.steps} steps: held-out loss {self.held_out[0]:.4g} before, "
            f"{self.held_out[self.best]:.4g} after step {self.best}, which was taken"
        )


def train(train_step: TrainStep, options: TrainingOptions, journal: Journal, progress: Progress) -> Trained:
    """Train, and leave the parameters with the least held-out loss in the student.

    Resumes from ``journal`` and writes to it periodically; a resumed training gives the same result as an uninterrupted
    one. A held-out loss that is not finite ends the training.

    Raises:
        CalibrantError: the held-out loss is not finite before the training.
        StoppedError: a signal asked to stop; the state is saved.
    """
    student, found = train_step.student, journal.read(NAME)
    if found is None:
        # Curves without a state are left over from an interrupted training, which now starts again.
        shutil.rmtree(journal.folder / CURVES, ignore_errors=True)
        now = _TrainingState({0: student.held_out()}, _copy(student.learned))
        if not math.isfinite(now.held_out[0]):
            raise CalibrantError("the held-out loss is not finite before the training; check the model")
    else:
        train_step.load(found.pop("train_step"))
        now = _TrainingState(**found)
        progress.note(f"training continues after step {now.done}, from {journal.folder}")
    written, wait = time.monotonic(), JOURNAL_SECONDS
    with (
        _curves(journal.folder / CURVES, now.done, progress) as write_scalar,
        progress.task("training", options.steps, "steps") as task,
    ):
        if now.done:
            task.advance(now.done)
        while not now.ended:
            numbers = train_step.step(now.done, 0.5 * (1 + math.cos(math.pi * now.done / options.steps)))
            now.done += 1
            task.advance()
            if math.isfinite(numbers["loss"]):
                now.losses = [*now.losses, numbers["loss"]][-options.eval_steps :]
            if now.done % options.eval_steps == 0 or now.done == options.steps:
                numbers["held_out"] = student.held_out()
                if math.isfinite(numbers["held_out"]):
                    now.held_out[now.done] = numbers["held_out"]
                else:
                    now.diverged = now.done
                if numbers["held_out"] < now.held_out[now.best]:
                    now.best, now.kept = now.done, _copy(student.learned)
                waited = now.done - now.best >= options.patience * options.eval_steps
                now.ended = now.done == options.steps or waited or now.diverged is not None
            for name, value in numbers.items():
                write_scalar(name, value, now.done)
            begin = time.monotonic()
            if now.ended or begin - written > wait or stop_requested():
                journal.write(NAME, {**vars(now), "train_step": train_step.state()})
                written = time.monotonic()
                wait = max(JOURNAL_SECONDS, JOURNAL_SHARE * (written - begin))
                check_stop(f"step {now.done} of the training")
    with torch.no_grad():
        for parameter, best_value in zip(student.learned, now.kept, strict=True):
            parameter.copy_(best_value)
    loss = sum(now.losses) / len(now.losses) if now.losses else None
    trained = Trained(now.held_out, now.best, now.done, loss, student.sharpness(), now.diverged)
    progress.note(trained.sentence())
    return trained


@contextmanager
def _curves(folder: Path, steps_done: int, progress: Progress) -> Iterator[Callable[[str, float, int], None]]:
    """Yield a function that writes a scalar (name, value, step) for TensorBoard to ``folder``.

    TensorBoard hides scalars after ``steps_done`` from an interrupted run. Without tensorboardX nothing is written.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        SummaryWriter = None  # noqa: N806  # the name of a class
    if SummaryWriter is None:
        progress.note("no training curves are written; they need the extra: pip install 'calibrant[training]'")
        yield lambda name, value, step: None
        return
    with SummaryWriter(str(folder), purge_step=steps_done + 1 if steps_done else None) as writer:
        yield writer.add_scalar


@dataclass
class _TrainingState:
    """Progress of a training: held-out losses by step, best parameters so far and their step, latest losses."""

    held_out: dict[int, float]
    kept: list[torch.Tensor]
    best: int = 0
    done: int = 0
    losses: list[float] = field(default_factory=list)
    ended: bool = False
    diverged: int | None = None


def _copy(parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in parameters]
