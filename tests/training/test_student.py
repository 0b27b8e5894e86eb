"""One step of a student: what it computes, its losses, sharpness-aware steps."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from calibrant.methods.solvers.rtn import rtn
from calibrant.modeling.checkpoint import ModelFolder
from calibrant.modeling.losses import divergences
from calibrant.modeling.token_rows import TokenRows
from calibrant.modeling.whole_model import load_whole
from calibrant.quantization.grids import GridSpec
from calibrant.randomness import make_rng
from calibrant.recipes.recipe import Recipe
from calibrant.training.sharpness import at_worst_nearby
from calibrant.training.student import Student
from calibrant.training.teacher import WholeTeacher
from calibrant.training.train_model import split_held_out
from calibrant.training.train_steps import TextStep
from tests.conftest import random_set
from tests.training.common import CPU, recipe, rounded, student


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gemma3"])
def test_the_student_computes_with_what_is_stored(model_folder, architecture: str) -> None:
    """Before any step: round-to-nearest."""
    made, _ = rounded(model_folder(architecture), recipe({"name": "qat"}, weights={"bits": 3, "group_size": 32}))
    spec = GridSpec(3, True, 32, torch.float32)
    for name, linear in made.trained().items():
        stored = rtn(linear.weight, spec).weight
        module = made.model.get_submodule(name)
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        assert torch.equal(weight.T if architecture == "gpt2" else weight, stored)


def test_a_move_is_as_long_as_the_radius_and_leaves_no_trace() -> None:
    draw = torch.Generator().manual_seed(0)
    parameters = [torch.randn(5, 7, generator=draw, requires_grad=True) for _ in range(3)]
    before = [parameter.detach().clone() for parameter in parameters]

    def loss() -> torch.Tensor:
        return torch.stack([(parameter**3).sum() for parameter in parameters]).sum()

    loss().backward()
    start = float(loss())
    with at_worst_nearby(parameters, 0.1):
        moves = [parameter.detach() - value for parameter, value in zip(parameters, before, strict=True)]
        worst = float(loss())
    assert torch.stack([move.norm() for move in moves]).norm() == pytest.approx(0.1, rel=1e-4)
    assert all(torch.equal(parameter, value) for parameter, value in zip(parameters, before, strict=True))
    for seed in range(20):
        draw = torch.Generator().manual_seed(seed)
        moves = [torch.randn(5, 7, generator=draw) for _ in parameters]
        length = torch.stack([move.norm() for move in moves]).norm()
        with torch.no_grad():
            near = sum(
                float(((value + 0.1 * move / length) ** 3).sum()) for value, move in zip(before, moves, strict=True)
            )
        assert near < worst
    assert worst > start


def steps_by_hand(
    folder: Path, chosen: Recipe, ids: torch.Tensor, radius: float, steps: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What a loop of AdamW and, for a radius, of gradients taken a move away leaves; and the rounded weights."""
    theirs, teacher = rounded(folder, chosen)
    learned = [parameter for parameters, _ in theirs.groups for parameter in parameters]
    groups = [{"params": parameters, "lr": 1e-3 * factor} for parameters, factor in theirs.groups]
    plain = torch.optim.AdamW(groups, weight_decay=0.0)

    def descend(rows: torch.Tensor) -> None:
        plain.zero_grad()
        answer = theirs.model(input_ids=ids[rows]).logits
        with torch.no_grad():
            target = teacher(input_ids=ids[rows]).logits
        (divergences(target, answer).flatten().sum() / (4 * 16)).backward()

    passes = np.concatenate([make_rng(0, "text", passed).permutation(len(ids)) for passed in range(1 + steps * 4)])
    for number in range(steps):
        rows = torch.from_numpy(passes[number * 4 : number * 4 + 4])
        descend(rows)
        if radius:
            gradients = [weight.grad.clone() for weight in theirs.weights if weight.grad is not None]
            norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
            kept = [weight.detach().clone() for weight in theirs.weights]
            with torch.no_grad():
                for weight, gradient in zip(theirs.weights, gradients, strict=True):
                    weight.add_(gradient * (radius / (norm + 1e-12)))
            descend(rows)
            with torch.no_grad():
                for weight, value in zip(theirs.weights, kept, strict=True):
                    weight.copy_(value)
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        plain.step()
    return learned, list(theirs.weights)


@pytest.mark.parametrize("radius", [0.0, 0.5])
def test_a_step_is_that_of_a_loop_by_hand_bit_for_bit(llama: Path, radius: float) -> None:
    """Without a radius AdamW's own."""
    chosen = recipe({"name": "qat", "sam_rho": radius})
    data = random_set(length=16)
    ids = data.tokens.long()
    ours = student(llama, chosen)
    assert chosen.training is not None
    step = TextStep(ours, chosen.training, TokenRows(ids, data.mask))  # type: ignore[arg-type]
    for number in range(4):
        step.step(number, 1.0)
    learned, weights = steps_by_hand(llama, chosen, ids, radius, 4)
    assert all(torch.equal(mine, other) for mine, other in zip(ours.learned, learned, strict=True))
    untouched, _ = steps_by_hand(llama, chosen, ids, radius, 0)
    assert not any(torch.equal(mine, other) for mine, other in zip(ours.learned, untouched, strict=True))
    plainly, _ = steps_by_hand(llama, chosen, ids, 0.0, 4)
    same = all(torch.equal(mine, other) for mine, other in zip(ours.learned, plainly, strict=True))
    assert same == (radius == 0.0)
    before = [weight.detach().clone() for weight in weights]
    with at_worst_nearby(weights, 0.0):
        assert all(torch.equal(one, other) for one, other in zip(weights, before, strict=True))


@pytest.mark.parametrize(("rows", "batch_size"), [(6, 4), (9, 3), (2, 4), (1, 4)])
def test_every_pass_takes_every_row_once(
    llama: Path, monkeypatch: pytest.MonkeyPatch, rows: int, batch_size: int
) -> None:
    chosen = recipe({"name": "qat", "batch_size": batch_size})
    data, ours, taken = random_set(samples=rows, length=16), student(llama, chosen), []

    def noted(part: TokenRows) -> torch.Tensor:
        taken.extend(part.ids.tolist())
        return torch.zeros(part.ids.shape, requires_grad=True)

    monkeypatch.setattr(ours, "losses", noted)
    assert chosen.training is not None
    step = TextStep(ours, chosen.training, TokenRows(data.tokens.long(), data.mask))  # type: ignore[arg-type]
    for number in range(6):
        step.step(number, 1.0)
    assert len(taken) == 6 * min(rows, batch_size)
    passes = [taken[begin : begin + rows] for begin in range(0, len(taken), rows)]
    assert all(sorted(one) == sorted(data.tokens.tolist()) for one in passes if len(one) == rows)
    assert rows == 1 or len({str(one) for one in passes}) > 1


def test_logits_are_run_in_parts_of_so_many_bytes(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary = ModelFolder(llama).vocabulary
    monkeypatch.setattr("calibrant.methods.training.LOGIT_BYTES", 2 * 4 * 16 * vocabulary)
    assert [part.stop for part in student(llama, recipe({"name": "qat"})).parts(5, 16)] == [2, 4, 5]
    assert [part.stop for part in student(llama, recipe({"name": "qat", "micro_batch_size": 3})).parts(5, 16)] == [3, 5]


def test_the_loss_of_a_text_is_that_of_its_next_tokens(llama: Path) -> None:
    learner = student(llama, recipe({"name": "qat", "objective": "text"}))
    data = random_set(samples=3, length=16, masked=4)
    ids = data.tokens.long()
    found = learner.losses(TokenRows(ids, data.mask))
    log_likelihoods = torch.log_softmax(learner.answer({"input_ids": ids}).detach(), -1)
    for row in range(3):
        for place in range(15):
            wanted = -log_likelihoods[row, place, ids[row, place + 1]] if place >= 3 else torch.zeros(())
            torch.testing.assert_close(found[row, place], wanted, rtol=1e-4, atol=1e-5)
    assert learner.positions(found, data.mask) == 3 * 12


def test_what_is_held_out_is_not_trained_on() -> None:
    data = random_set(samples=17, length=32)
    options = recipe({"name": "qat"}).training
    assert options is not None
    (held_out, _), (rest, _) = split_held_out(TokenRows(data.tokens, data.mask), options, True, CPU)
    assert len(held_out) == 2 * 2
    assert len(rest) == 15 * 2
    pieces = {tuple(row) for row in data.tokens.reshape(-1, 16).tolist()}
    assert {tuple(row) for row in held_out.tolist()} | {tuple(row) for row in rest.tolist()} == pieces


def test_reported_sharpness_is_the_rise_a_fixed_distance_away(llama: Path) -> None:
    learner = student(llama, recipe({"name": "qat"}, weights={"bits": 4}))
    watched = random_set(samples=2, length=16, seed=9)
    ids = watched.tokens.long()

    def loss() -> torch.Tensor:
        return divergences(learner.target({"input_ids": ids}).detach(), learner.answer({"input_ids": ids})).mean()

    here = loss()
    weights = learner.learner.weights
    gradients = torch.autograd.grad(here, weights)
    length = torch.stack([gradient.norm() for gradient in gradients]).norm()
    with torch.no_grad():
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.add_(gradient, alpha=0.05 / float(length))
        there = float(loss())
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.sub_(gradient, alpha=0.05 / float(length))
    assert there != float(here.detach())
    assert learner.sharpness() == pytest.approx(there - float(here.detach()), rel=1e-2)


def test_logits_are_computed_in_float32(llama: Path) -> None:
    chosen = recipe({"name": "qat"})
    assert chosen.training is not None
    watched = random_set(samples=2, length=16, seed=9)
    rows = TokenRows(watched.tokens.long(), watched.mask)
    model, teacher = rounded(llama, chosen)
    learner = Student(model, WholeTeacher(teacher, torch.bfloat16), chosen.training, rows, torch.bfloat16, causal=True)
    with torch.no_grad():
        logits = learner.answer({"input_ids": rows[0]})
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())


def test_the_divergence_of_a_model_from_itself_is_nothing(llama: Path) -> None:
    model = load_whole(ModelFolder(llama), "cpu", "float32")
    logits = model(input_ids=random_set(length=16).tokens.long()).logits
    assert float(divergences(logits, logits).abs().max()) < 1e-6


@pytest.mark.parametrize("shape", [(3, 50, 20), (7, 3)])
def test_the_divergence_is_that_of_the_library_with_its_gradients(shape: tuple[int, ...]) -> None:
    draw = torch.Generator().manual_seed(0)
    teacher, student = (3 * torch.randn(shape, generator=draw) for _ in range(2))
    weights = torch.randn(shape[:-1], generator=draw)
    ours = [teacher.clone().requires_grad_(True), student.clone().requires_grad_(True)]
    found = divergences(*ours)
    (found * weights).sum().backward()
    theirs = [teacher.double().requires_grad_(True), student.double().requires_grad_(True)]
    log_p, log_q = (torch.log_softmax(logits, -1) for logits in theirs)
    expected = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    (expected * weights).sum().backward()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    for one, other in zip(ours, theirs, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-4, atol=1e-6)
