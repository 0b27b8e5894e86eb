"""Training steps: on a calibration set (QAT, Quadapter), and against a generator (ZSAQ, arXiv 2310.13315)."""

from typing import Any

import torch
from torch import nn

from calibrant.methods.training import OnText, Zsaq
from calibrant.modeling.losses import divergences
from calibrant.modeling.model_head import Inputs
from calibrant.modeling.token_rows import TokenRows
from calibrant.randomness import make_rng
from calibrant.training.generator import Generator
from calibrant.training.student import LARGEST_GRADIENT, Student


class TextStep:
    """Trains on rows of a calibration set, towards the teacher's logits or the next token.

    Args:
        student: the model to train.
        options: the recipe's training options.
        rows: the training rows.
    """

    def __init__(self, student: Student, options: OnText, rows: TokenRows) -> None:
        self.student, self._options = student, options
        self._tokens, self._counted = rows
        self.state, self.load = student.state, student.load

    def step(self, number: int, rate: float) -> dict[str, float]:
        """Update the student on the next rows; each pass takes every row once, in an order of its own."""
        total, count = len(self._tokens), min(self._options.batch_size, len(self._tokens))
        passed, begin = divmod(number * count, total)
        chosen = (self._order(passed) + self._order(passed + 1))[begin : begin + count]
        ids, counted = self._tokens[chosen], self._counted[chosen]
        return self.student.descend(rate, lambda: self._loss(ids, counted))

    def _order(self, passed: int) -> list[int]:
        """The order of the rows after ``passed`` passes."""
        order: list[int] = make_rng(self._options.seed, "text", passed).permutation(len(self._tokens)).tolist()
        return order

    def _loss(self, ids: torch.Tensor, counted: torch.Tensor) -> float:
        total = 0.0
        for part in self.student.parts(*ids.shape):
            losses = self.student.losses(TokenRows(ids[part], counted[part]))
            loss = losses.sum() / self.student.positions(losses, counted)
            loss.backward()
            total += float(loss.detach())
        return total


class ZsaqStep:
    """Trains on a generator's output for random tokens.

    The generator ascends the divergence between student and teacher, which the student descends.

    Args:
        student: the model to train.
        options: the recipe's training options.
        eligible: token ids to draw rows from, int64.
        generator: None to train on the random tokens themselves.
    """

    def __init__(self, student: Student, options: Zsaq, eligible: torch.Tensor, generator: Generator | None) -> None:
        self.student, self._options, self.eligible, self.generator = student, options, eligible, generator
        self._ascent: torch.optim.Adam | None = None
        if generator is not None and options.generator_learning_rate:
            generator.requires_grad_(True)
            # Adam instead of the paper's plain gradient ascent, whose clipped steps hardly move the weights (ours).
            self._ascent = torch.optim.Adam(self._learning(), lr=options.generator_learning_rate, maximize=True)

    def step(self, number: int, rate: float) -> dict[str, float]:
        """Update the generator, then the student, each on separately drawn rows."""
        numbers = {}
        if self._ascent is not None:
            numbers["generator"] = self.ascend(self._rows(number, "generator"), self._draw(number, "generator"))
        inputs = self._inputs(self._rows(number, "student"), self._draw(number, "student"))
        targets = [self._target(part) for part in self._split(inputs)]
        return numbers | self.student.descend(rate, lambda: self._loss(inputs, targets))

    def state(self) -> dict[str, Any]:
        """State of the student and of the generator."""
        mine = {}
        if self._ascent is not None:
            learned = [parameter.detach() for parameter in self._learning()]
            mine = {"generator": learned, "ascent": self._ascent.state_dict()}
        return {**self.student.state(), **mine}

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        """Restore a ``state``."""
        self.student.load(state)
        if self._ascent is not None:
            for parameter, value in zip(self._learning(), state["generator"], strict=True):
                parameter.copy_(value)
            self._ascent.load_state_dict(state["ascent"])

    def _learning(self) -> list[nn.Parameter]:
        assert self.generator is not None
        return list(self.generator.parameters())

    def _rows(self, number: int, purpose: str) -> torch.Tensor:
        draw = make_rng(self._options.seed, "zsaq", purpose, number)
        shape = (self._options.batch_size, self._options.length)
        return self.eligible[torch.from_numpy(draw.integers(0, len(self.eligible), shape)).to(self.eligible.device)]

    def _draw(self, number: int, purpose: str) -> torch.Generator:
        seed = int(make_rng(self._options.seed, "zsaq", "draw", purpose, number).integers(2**63))
        return torch.Generator(self.eligible.device).manual_seed(seed)

    @torch.no_grad()
    def _inputs(self, ids: torch.Tensor, draw: torch.Generator) -> Inputs:
        if self.generator is None:
            return {"input_ids": ids}
        return {"inputs_embeds": torch.cat([self._generated(ids[part], draw) for part in self._parts()])}

    def _generated(self, ids: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
        assert self.generator is not None
        with self.student.computing():
            vectors: torch.Tensor = self.generator(ids, draw)
        return vectors.float()

    def _parts(self) -> list[slice]:
        return list(self.student.parts(self._options.batch_size, self._options.length))

    def _split(self, inputs: Inputs) -> list[Inputs]:
        return [{name: value[part] for name, value in inputs.items()} for part in self._parts()]

    @torch.no_grad()
    def _target(self, inputs: Inputs) -> torch.Tensor:
        return self.student.target(inputs)

    def _loss(self, inputs: Inputs, targets: list[torch.Tensor]) -> float:
        total = 0.0
        for part, target in zip(self._split(inputs), targets, strict=True):
            loss = self._share(divergences(target, self.student.answer(part)))
            loss.backward()
            total += float(loss.detach())
        return total

    def ascend(self, ids: torch.Tensor, draw: torch.Generator) -> float:
        """Take one generator step up the divergence between student and teacher; return the divergence."""
        assert self._ascent is not None
        learning, total = self._learning(), 0.0
        sums = [torch.zeros_like(parameter) for parameter in learning]
        for part in self._parts():
            inputs = {"inputs_embeds": self._generated(ids[part], draw)}
            apart = self._share(divergences(self.student.target(inputs), self.student.answer(inputs)))
            # `autograd.grad` of the generator's parameters only: `backward` would also compute the student's gradients.
            for into, gradient in zip(sums, torch.autograd.grad(apart, learning, allow_unused=True), strict=True):
                if gradient is not None:
                    into += gradient
            total += float(apart.detach())
        for parameter, gradient in zip(learning, sums, strict=True):
            parameter.grad = gradient
        nn.utils.clip_grad_norm_(learning, LARGEST_GRADIENT)
        self._ascent.step()
        self._ascent.zero_grad()
        return total

    def _share(self, each: torch.Tensor) -> torch.Tensor:
        """Contribution of some rows to the mean over the whole batch."""
        positions = self._options.batch_size * (self._options.length if each.ndim == 2 else 1)
        return each.sum() / positions
