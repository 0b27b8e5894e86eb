"""Training of rounded weights: QAT and ZSAQ on small models, from one step to the file that is loaded again."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import calibrant as cb
from calibrant.api import prepare
from calibrant.calibration.calibration_set import CalibrationSet
from calibrant.errors import CalibrantError
from calibrant.methods.solvers.rtn import rtn
from calibrant.modeling.checkpoint import ModelFolder
from calibrant.modeling.lazy_model import LazyModel
from calibrant.modeling.losses import divergences
from calibrant.modeling.structure import find_blocks
from calibrant.modeling.whole_model import load_whole
from calibrant.progress import NoProgress
from calibrant.quantization.grids import GridSpec
from calibrant.randomness import make_rng
from calibrant.recipes.make_plan import make_plan
from calibrant.recipes.recipe import Recipe, load_recipe
from calibrant.training import train_model, training_loop
from calibrant.training.generator import Generator, read_embeddings
from calibrant.training.journal import Journal
from calibrant.training.learned_range import see_inputs
from calibrant.training.rounded_model import RoundedModel
from calibrant.training.sharpness import at_worst_nearby
from calibrant.training.student import Student
from calibrant.training.train_steps import TextStep, ZsaqStep
from tests.checkpoints import loaded_divergence
from tests.conftest import random_set, write_model

W4A8 = {"weights": {"bits": 4, "range_search": "mse"}, "activations": {"bits": 8}}
CPU = torch.device("cpu")


def recipe(training: dict[str, Any], **scheme: Any) -> Recipe:
    short = {"steps": 6, "batch_size": 4, "length": 16, "eval_steps": 3, "learning_rate": 1e-3}
    return Recipe.model_validate(
        {
            "name": "r",
            "description": "d",
            "training": {**short, **training},
            "method": {"name": "rtn"},
            "scheme": scheme or W4A8,
        }
    )


def rounded(folder: Path, chosen: Recipe) -> tuple[RoundedModel, transformers.PreTrainedModel]:
    """The student that a run would train, and its teacher."""
    opened = ModelFolder(folder, allow_encoder=True)
    lazy = LazyModel(opened, opened.dtype, CPU)
    plan = make_plan(lazy, find_blocks(lazy.module), chosen)
    return RoundedModel(load_whole(opened, "cpu", "float32"), plan), load_whole(opened, "cpu", "float32")


def student(folder: Path, chosen: Recipe) -> Student:
    assert chosen.training is not None
    watched = random_set(samples=2, length=16, seed=9)
    return Student(
        *rounded(folder, chosen),
        chosen.training,
        (watched.tokens.long(), watched.mask),
        torch.float32,
        causal=True,
    )


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

    for number in range(steps):
        rows = torch.from_numpy(np.asarray(make_rng(0, "text", number).choice(len(ids), 4, replace=False)))
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
    lesson = TextStep(ours, chosen.training, (ids, data.mask))  # type: ignore[arg-type]
    for number in range(4):
        lesson.step(number, 1.0)
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


@pytest.mark.parametrize(
    ("architecture", "training"),
    [
        ("llama", {"name": "qat"}),
        ("llama", {"name": "zsaq", "generator_learning_rate": 1e-3}),
        ("llama", {"name": "zsaq", "generator_learning_rate": 1e-3, "generator": "opt"}),
        ("bert", {"name": "qat", "length": 32}),
    ],
)
def test_rows_one_at_a_time_make_the_same_step(
    model_folder, tmp_path: Path, architecture: str, training: dict[str, Any]
) -> None:
    if "generator" in training:
        # Of another vocabulary, as its tokenizer says.
        other = shutil.copytree(model_folder(training["generator"]), tmp_path / "generator")
        words = (other / "tokenizer.json").read_text().replace('"A": ', '"AA": ')
        (other / "tokenizer.json").write_text(words)
        training = {**training, "generator": str(other)}
    model = shutil.copytree(model_folder(architecture), tmp_path / "model")
    if architecture == "bert":
        # The classes of random weights are all but level.
        tensors = load_file(model / "model.safetensors")
        tensors["classifier.weight"] *= 300
        save_file(tensors, model / "model.safetensors", {"format": "pt"})
    data = random_set(model)
    for name, rows in {"whole": None, "parts": 1}.items():
        chosen = recipe({**training, "steps": 1, "micro_batch_size": rows})
        encoder = architecture == "bert"
        options = {"allow_encoder": encoder, "dtype": "float32"}
        cb.compress(model, output=tmp_path / name, recipe=chosen, calibration=data, **options)
    whole, parts = (json.loads((tmp_path / name / "calibrant.json").read_text()) for name in ("whole", "parts"))
    assert parts["training"]["loss"] == pytest.approx(
        whole["training"]["loss"], rel=1e-4 if architecture == "llama" else 5e-3
    )
    for name, value in load_file(tmp_path / "whole" / "model.safetensors").items():
        other = load_file(tmp_path / "parts" / "model.safetensors")[name]
        if "packed" not in name:
            torch.testing.assert_close(other, value, rtol=1e-3, atol=1e-4)


def test_logits_are_run_in_parts_of_so_many_bytes(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary = ModelFolder(llama).vocabulary
    monkeypatch.setattr("calibrant.recipes.parts._LOGIT_BYTES", 2 * 4 * 16 * vocabulary)
    assert [part.stop for part in student(llama, recipe({"name": "qat"})).parts(5, 16)] == [2, 4, 5]
    assert [part.stop for part in student(llama, recipe({"name": "qat", "micro_batch_size": 3})).parts(5, 16)] == [3, 5]


def test_the_loss_of_a_text_is_that_of_its_next_tokens(llama: Path) -> None:
    learner = student(llama, recipe({"name": "qat", "objective": "text"}))
    data = random_set(samples=3, length=16, masked=4)
    ids = data.tokens.long()
    found = learner.losses((ids, data.mask))
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
    (held_out, _), (rest, _) = train_model._rows(data, options, True, CPU)
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
    weights = learner._learner.weights
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
    rows = watched.tokens.long(), watched.mask
    learner = Student(*rounded(llama, chosen), chosen.training, rows, torch.bfloat16, causal=True)
    with torch.no_grad():
        logits = learner.answer({"input_ids": rows[0]})
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())


def test_the_rate_falls_as_a_cosine(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = []
    step = TextStep.step

    def noted(self: TextStep, number: int, rate: float) -> dict[str, float]:
        rates.append(rate)
        return step(self, number, rate)

    monkeypatch.setattr(TextStep, "step", noted)
    chosen = recipe({"name": "qat", "steps": 4})
    cb.compress(llama, output=tmp_path / "out", recipe=chosen, calibration=random_set(llama))
    assert rates == pytest.approx([1.0, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5])


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


@pytest.mark.parametrize("same_vocabulary", [True, False])
def test_the_generators_gradient_is_that_of_finite_differences(model_folder, same_vocabulary: bool) -> None:
    """Along a direction; the rounding of a student has no derivative, so here another model stands for it.

    Drawn tokens have none either: there it is that of the distribution's mean, weighted as the drawn ones ask for.
    """
    teacher, other, writer = (
        load_whole(ModelFolder(model_folder(name)), "cpu", "float32") for name in ("llama", "mistral", "qwen2")
    )
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    embeddings = read_embeddings(teacher)
    generator = Generator(writer, embeddings, same_vocabulary, 0.5, seed=0)
    ids = random_set(length=12).tokens.long()

    def vectors() -> torch.Tensor:
        found: torch.Tensor = make_rng(ids, torch.Generator().manual_seed(1))
        return found

    def apart(read: torch.Tensor) -> torch.Tensor:
        return divergences(teacher(inputs_embeds=read).logits, other(inputs_embeds=read).logits).mean()

    read = vectors()
    if same_vocabulary:
        rows = read.detach().flatten(0, 1)[:, None]
        assert float((rows - embeddings).abs().amax(-1).amin(-1).max()) < 1e-6
    (wanted,) = torch.autograd.grad(apart(read), read, retain_graph=True)

    def value() -> torch.Tensor:
        if not same_vocabulary:
            return apart(vectors())
        return (wanted * (torch.softmax(writer(input_ids=ids).logits / 0.5, -1) @ embeddings)).sum()

    learning = list(generator.parameters())
    gradients = torch.autograd.grad(apart(read), learning, allow_unused=True)
    pairs = [(one, gradient) for one, gradient in zip(learning, gradients, strict=True) if gradient is not None]
    length = torch.stack([gradient.norm() for _, gradient in pairs]).norm()
    assert length > 0
    values = []
    for step in (0.004, -0.004):
        with torch.no_grad():
            for parameter, gradient in pairs:
                parameter.add_(gradient / length, alpha=step)
            values.append(float(value()))
            for parameter, gradient in pairs:
                parameter.sub_(gradient / length, alpha=step)
    assert (values[0] - values[1]) / 0.008 == pytest.approx(float(length), rel=0.03)


def test_mapped_vectors_look_like_embeddings(model_folder) -> None:
    teacher = load_whole(ModelFolder(model_folder("gemma3")), "cpu", "float32")
    embeddings = read_embeddings(teacher)
    ids = random_set(length=16).tokens.long()
    assert torch.equal(embeddings[ids], teacher.get_input_embeddings()(ids))
    writer = load_whole(ModelFolder(model_folder("llama")), "cpu", "float32")
    with torch.no_grad():
        vectors = Generator(writer, embeddings, False, 1.0, seed=0)(ids, torch.Generator())
    for row in vectors:
        for found, wanted in zip(torch.std_mean(row, 0), torch.std_mean(embeddings, 0), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-4)


def zsaq(folder: Path, **training: Any) -> ZsaqStep:
    chosen = recipe({"name": "zsaq", **training}, weights={"bits": 2})
    made = student(folder, chosen)
    teacher = load_whole(ModelFolder(folder), "cpu", "float32")
    generator = Generator(teacher, read_embeddings(teacher), True, 1.0, seed=0)
    return ZsaqStep(made, chosen.training, torch.arange(4, 99), generator)  # type: ignore[arg-type]


def test_the_generator_drives_them_apart(llama: Path) -> None:
    lesson = zsaq(llama, generator_learning_rate=3e-3)
    ids = random_set(samples=4, length=16).tokens.long()
    apart = [lesson._ascend(ids, torch.Generator().manual_seed(step)) for step in range(40)]
    assert sum(apart[-8:]) > 1.1 * sum(apart[:8])


def test_the_generators_gradient_is_clipped(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("calibrant.training.train_steps.LARGEST_GRADIENT", 1e-6)
    lesson = zsaq(llama)
    lesson._ascend(random_set(samples=4, length=16).tokens.long(), torch.Generator().manual_seed(0))
    assert lesson._ascent is not None
    moments = [state["exp_avg"].norm() for state in lesson._ascent.state.values()]
    # Adam's first moment of a first step is a tenth of the gradient.
    assert float(torch.stack(moments).norm()) == pytest.approx(1e-7, rel=1e-3)


def test_special_tokens_are_no_seeds(llama: Path) -> None:
    chosen = recipe({"name": "zsaq"})
    teacher = load_whole(ModelFolder(llama), "cpu", "float32")
    lesson = train_model._zsaq(ModelFolder(llama), student(llama, chosen), teacher, chosen.training, CPU)  # type: ignore[arg-type]
    assert lesson._eligible.tolist() == list(range(4, 99))


def test_a_frozen_generator_stays(llama: Path) -> None:
    for rate, stays in ((0.0, True), (1e-3, False)):
        lesson = zsaq(llama, generator_learning_rate=rate)
        assert lesson._generator is not None
        before = [parameter.detach().clone() for parameter in lesson._generator.parameters()]
        lesson.step(0, 1.0)
        after = list(lesson._generator.parameters())
        assert stays == all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


@pytest.fixture
def peaked(llama: Path, tmp_path: Path) -> Path:
    """``llama`` with larger weights: random ones of the usual size give next to uniform distributions."""
    folder = shutil.copytree(llama, tmp_path / "peaked")
    tensors = load_file(folder / "model.safetensors")
    larger = {name: value * 8 if "proj" in name or "lm_head" in name else value for name, value in tensors.items()}
    save_file(larger, folder / "model.safetensors", {"format": "pt"})
    return folder


LONGER = {"steps": 60, "eval_steps": 10, "batch_size": 8}


@pytest.mark.parametrize(
    "training",
    [{"name": "qat"}, {"name": "qat", "sam_rho": 0.05}, {"name": "zsaq"}, {"name": "zsaq", "inputs": "random"}],
)
def test_training_brings_the_student_closer(peaked: Path, tmp_path: Path, training: dict[str, Any]) -> None:
    chosen = recipe({**training, **LONGER}, weights={"bits": 3}, activations={"bits": 8})
    cb.compress(
        peaked, output=tmp_path / "out", recipe=chosen, calibration=random_set(peaked, samples=64), dtype="float32"
    )
    record = json.loads((tmp_path / "out" / "calibrant.json").read_text())
    held_out = record["training"]["held_out"]
    assert held_out[str(record["training"]["best"])] < 0.8 * held_out["0"]
    assert (record["calibration"] is None) == (training["name"] == "zsaq")


@pytest.mark.parametrize(
    "scheme",
    [
        {"weights": {"bits": 4, "range_search": "mse"}, "activations": {"bits": 8}},
        {"weights": {"bits": 2, "group_size": 32}, "activations": {"bits": 8}},
        {"weights": {"bits": 8}, "activations": {"bits": 8, "dynamic": False}},
        {"weights": {"bits": 4, "group_size": 32}},
    ],
)
def test_what_is_loaded_is_what_was_trained(llama: Path, tmp_path: Path, scheme: dict[str, Any]) -> None:
    """The divergence that training saw on held-out rows, from the files by another library."""
    data = random_set(llama, samples=8, length=16)
    cb.compress(
        llama, output=tmp_path / "out", recipe=recipe({"name": "qat"}, **scheme), calibration=data, dtype="float32"
    )
    training = json.loads((tmp_path / "out" / "calibrant.json").read_text())["training"]
    found = loaded_divergence(tmp_path / "out", llama, data.tokens[-1:].long())
    assert found == pytest.approx(training["held_out"][str(training["best"])], rel=1e-3)
    assert list((tmp_path / "out" / "training").glob("events*"))
    assert not (tmp_path / "out.training").exists()


@pytest.mark.parametrize("architecture", ["gpt2", "falcon"])
def test_what_is_stored_dense_is_trained_in_the_files_dtype(tmp_path: Path, architecture: str) -> None:
    """Loaders read these values themselves, not codes."""
    model = write_model(tmp_path / "model", architecture, torch.bfloat16)
    opened = ModelFolder(model)
    lazy = LazyModel(opened, opened.dtype, CPU)
    plan = make_plan(lazy, find_blocks(lazy.module), recipe({"name": "qat"}, weights={"bits": 8}))
    assert plan.layout is None
    learner = RoundedModel(load_whole(opened, "cpu", "float32"), plan)
    for name in plan.linears:
        weight = learner.model.get_submodule(name).weight
        assert torch.equal(weight, weight.bfloat16().float())


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "gemma3", "bert"])
def test_architectures_can_be_trained(model_folder, tmp_path: Path, architecture: str) -> None:
    inputs = "random" if architecture == "bert" else "generator"
    report = cb.compress(
        model_folder(architecture),
        output=tmp_path / "out",
        recipe=recipe({"name": "zsaq", "inputs": inputs}, **W4A8),
        allow_encoder=architecture == "bert",
    )
    assert any("held-out loss" in note for note in report.notes)
    assert len(report.layers) == {"gpt2": 8, "opt": 12, "gemma3": 14, "bert": 12}[architecture]


def test_a_language_model_of_another_vocabulary_can_be_the_generator(llama: Path, model_folder, tmp_path: Path) -> None:
    writer = shutil.copytree(model_folder("opt"), tmp_path / "writer")
    text = (writer / "tokenizer.json").read_text().replace('"~"', '"~~"')
    (writer / "tokenizer.json").write_text(text)
    chosen = recipe({"name": "zsaq", "generator": str(writer), "generator_learning_rate": 1e-4})
    report = cb.compress(llama, output=tmp_path / "out", recipe=chosen)
    assert report.tensors_verified


class _StoppedError(Exception):
    pass


def _journal_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_loop, "_JOURNAL_SECONDS", -1.0)
    monkeypatch.setattr(training_loop, "_JOURNAL_SHARE", -1)


class _StopsAfter(NoProgress):
    def __init__(self, steps: int) -> None:
        self.left, self.notes = steps, list[str]()

    @contextmanager
    def task(self, label: str, total: int | None) -> Iterator[Any]:
        outer = self

        class Handle:
            def advance(self, steps: int = 1) -> None:
                if label == "training":
                    if not outer.left:
                        raise _StoppedError
                    outer.left -= 1

        yield Handle()

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.parametrize("training", [{"name": "qat"}, {"name": "zsaq", "generator_learning_rate": 1e-3}])
def test_a_killed_training_goes_on_to_the_same_bytes(
    llama: Path, tmp_path: Path, training: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _journal_every_step(monkeypatch)
    chosen, data = recipe({**training, "steps": 8}), random_set(llama)
    cb.compress(llama, output=tmp_path / "whole", recipe=chosen, calibration=data)
    for steps in (3, 2):
        stopping = _StopsAfter(steps)
        with pytest.raises(_StoppedError):
            cb.compress(llama, output=tmp_path / "parts", recipe=chosen, calibration=data, progress=stopping)
        assert not (tmp_path / "parts").exists()
    ends = _StopsAfter(99)
    cb.compress(llama, output=tmp_path / "parts", recipe=chosen, calibration=data, progress=ends)
    assert any("goes on after step 4" in note for note in ends.notes)
    for name in ("model.safetensors", "calibrant.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_another_training_begins_anew_and_a_damaged_journal_says_what_to_do(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _journal_every_step(monkeypatch)
    data = random_set(llama)

    def run(steps: int, stops: int, overwrite: bool = True) -> _StopsAfter:
        listener = _StopsAfter(stops)
        chosen = recipe({"name": "qat", "steps": steps})
        cb.compress(
            llama, output=tmp_path / "out", recipe=chosen, calibration=data, progress=listener, overwrite=overwrite
        )
        return listener

    with pytest.raises(_StoppedError):
        run(8, 3)
    with pytest.raises(CalibrantError, match="holds an unfinished training with other settings"):
        run(5, 99, overwrite=False)
    other = recipe({"name": "qat", "steps": 5})
    for known in (data, None):
        with pytest.raises(CalibrantError, match="holds an unfinished training with other settings"):
            prepare(llama, output=tmp_path / "out", recipe=other, calibration=known)
        prepare(llama, output=tmp_path / "out", recipe=recipe({"name": "qat", "steps": 8}), calibration=known)
    assert not any("goes on" in note for note in run(5, 99).notes)
    with pytest.raises(_StoppedError):
        run(8, 3)
    state = tmp_path / "out.training" / "steps.safetensors"
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(CalibrantError, match=r"steps\.safetensors: damaged .* begin the training anew"):
        run(8, 99)


def test_what_a_killed_write_left_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "out.training"
    folder.mkdir()
    for name in (".steps.safetensors.17.partial", ".tmpAb3"):
        (folder / name).write_text("half")
    journal = Journal(tmp_path / "out", {"a": 1}, overwrite=False)
    state = {"learned": [torch.ones(2)], "number": 3, "moments": {0: {"step": torch.tensor(4.0)}}, "none": None}
    journal.write("steps", state)
    assert sorted(path.name for path in folder.iterdir()) == ["steps.safetensors", "training.json"]
    found = journal.read("steps")
    assert found is not None
    assert torch.equal(found["learned"][0], state["learned"][0])
    assert (found["number"], float(found["moments"][0]["step"]), found["none"]) == (3, 4.0, None)


def test_an_early_stop_is_the_same_after_a_break(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _journal_every_step(monkeypatch)
    worse = recipe({"name": "qat", "steps": 30, "eval_steps": 1, "patience": 4, "learning_rate": 0.5})
    data = random_set(llama)
    cb.compress(llama, output=tmp_path / "whole", recipe=worse, calibration=data)
    with pytest.raises(_StoppedError):
        cb.compress(llama, output=tmp_path / "parts", recipe=worse, calibration=data, progress=_StopsAfter(2))
    cb.compress(llama, output=tmp_path / "parts", recipe=worse, calibration=data)
    first, second = ((tmp_path / name / "calibrant.json").read_bytes() for name in ("whole", "parts"))
    assert first == second
    training = json.loads(first)["training"]
    assert training["steps"] == training["best"] + 4 < 30


def test_inputs_that_are_one_tensor_have_one_range(model_folder, tmp_path: Path) -> None:
    static = {"weights": {"bits": 8}, "activations": {"bits": 8, "dynamic": False}}
    for architecture in ("opt", "llama"):
        model, output = model_folder(architecture), tmp_path / architecture
        chosen = recipe({"name": "qat", "learning_rate": 1e-2}, **static)
        cb.compress(model, output=output, recipe=chosen, calibration=random_set(model))
        stored = load_file(output / "model.safetensors")
        scales = {name: value for name, value in stored.items() if name.endswith("input_scale") and "layers.0." in name}
        several = [float(value) for name, value in scales.items() if any(one in name for one in ("q_", "k_", "v_"))]
        assert len(several) == 3
        assert len(set(several)) == 1
        assert len({float(value) for value in scales.values()}) > 1


@pytest.mark.parametrize("architecture", ["llama", "bert", "opt"])
def test_uncounted_tokens_change_nothing(model_folder, tmp_path: Path, architecture: str) -> None:
    """A classifier sees them, so they are hidden from it."""
    model = model_folder(architecture)
    whole = random_set(model, samples=9)
    mask = whole.mask.clone()
    mask[:, 24:] = False
    tokens = whole.tokens.clone()
    tokens[:, 24:] = 7
    static = {"weights": {"bits": 8}, "activations": {"bits": 8, "dynamic": False}}
    for name, one in {"a": whole.tokens, "b": tokens}.items():
        data = CalibrationSet.build(one, mask, whole.manifest)
        chosen = recipe({"name": "qat", "length": 32}, **static)
        cb.compress(model, output=tmp_path / name, recipe=chosen, calibration=data, allow_encoder=True)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b"))
    assert all(torch.equal(first[name], second[name]) for name in first)


class _Pooled(torch.nn.Module):
    """Gives a linear one row of each sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 3)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.linear(input_ids[:, 0])
        return found


def test_ranges_that_nothing_was_seen_for_are_refused(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pooled = _Pooled()
    rows = torch.ones(2, 5, 3), torch.ones(2, 5, dtype=torch.bool)
    with pytest.raises(CalibrantError, match="linear: is given other rows than the tokens"):
        see_inputs(pooled, ["linear"], [rows], causal=True)
    monkeypatch.setattr(RoundedModel, "input_grids", lambda _: {})
    static = {"weights": {"bits": 8}, "activations": {"bits": 8, "dynamic": False}}
    with pytest.raises(CalibrantError, match="q_proj: no calibration token reached it"):
        cb.compress(
            llama, output=tmp_path / "out", recipe=recipe({"name": "qat"}, **static), calibration=random_set(llama)
        )


def test_checkpointing_changes_nothing(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"kept": 0, "again": 0}
    real = train_model.checkpoint
    for name, checkpointing in {"kept": False, "again": True}.items():

        def counted(*arguments: Any, now: str = name, **options: Any) -> Any:
            calls[now] += 1
            return real(*arguments, **options)

        monkeypatch.setattr(train_model, "checkpoint", counted)
        chosen = recipe({"name": "zsaq", "gradient_checkpointing": checkpointing, "generator_learning_rate": 1e-3})
        cb.compress(llama, output=tmp_path / name, recipe=chosen, dtype="float32")
    assert calls["kept"] == 0 < calls["again"]
    kept, again = (load_file(tmp_path / name / "model.safetensors") for name in ("kept", "again"))
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_weights_that_are_not_trained_keep_their_bytes(llama: Path, tmp_path: Path) -> None:
    cb.compress(llama, output=tmp_path / "out", recipe=recipe({"name": "qat"}), calibration=random_set(llama))
    before, after = (load_file(folder / "model.safetensors") for folder in (llama, tmp_path / "out"))
    kept = [name for name in before if "_proj" not in name]
    assert len(kept) == 7
    assert all(torch.equal(before[name], after[name]) for name in kept)


def test_the_commands_seed_is_the_trainings_where_the_recipe_says_none(llama: Path, tmp_path: Path) -> None:
    for name, chosen in {"none": recipe({"name": "zsaq"}), "one": recipe({"name": "zsaq", "seed": 5})}.items():
        cb.compress(llama, output=tmp_path / name, recipe=chosen, seed=7)
    seeds = {
        name: json.loads((tmp_path / name / "calibrant.json").read_text())["recipe"]["training"]["seed"]
        for name in ("none", "one")
    }
    assert seeds == {"none": 7, "one": 5}
    changed = load_recipe("zsaq-w4a8").with_weights(2, None).with_seed(7)
    assert changed.training is not None
    assert changed.training.seed == 7
    with pytest.raises(CalibrantError, match="must be 0 or more"):
        cb.compress(llama, output=tmp_path / "none", recipe=recipe({"name": "zsaq"}), seed=-1, overwrite=True)


def test_a_damaged_description_of_a_training_says_what_to_do(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out.training"
    folder.mkdir()
    (folder / "training.json").write_text('{"recipe": ')
    save_file({"a": torch.zeros(1)}, folder / "steps.safetensors")
    with pytest.raises(CalibrantError, match=r"training\.json: damaged; delete"):
        prepare(llama, output=tmp_path / "out", recipe=recipe({"name": "zsaq"}))


def test_models_that_cannot_be_trained_are_refused(llama: Path, tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=99, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=96
    )
    folder = shutil.copytree(llama, tmp_path / "plain")
    (folder / "model.safetensors").unlink()
    transformers.BertModel(config).save_pretrained(folder)
    options = {"output": tmp_path / "out", "allow_encoder": True}
    with pytest.raises(CalibrantError, match="BertModel: gives no logits"):
        cb.compress(folder, recipe=recipe({"name": "zsaq", "inputs": "random"}), **options)
    with pytest.raises(CalibrantError, match="writes no text, so it makes no calibration set"):
        cb.compress(folder, recipe=recipe({"name": "qat"}), **options)


def test_refusals(llama: Path, model_folder, tmp_path: Path) -> None:
    for scheme, others, said in (
        ({**W4A8, "activations": {"bits": 8, "dynamic": False}}, {}, "zsaq has no data"),
        (W4A8, {"transforms": [{"name": "smoothquant"}]}, "without transforms"),
        (W4A8, {"method": {"name": "gptq"}}, "ends with method rtn"),
    ):
        value = {
            "name": "r",
            "description": "d",
            "training": {"name": "zsaq"},
            "method": {"name": "rtn"},
            "scheme": scheme,
        }
        with pytest.raises(ValueError, match=said):
            Recipe.model_validate({**value, **others})
    with pytest.raises(CalibrantError, match="fused experts, which qat"):
        cb.compress(model_folder("mixtral"), output=tmp_path / "out", recipe=recipe({"name": "qat"}))
    with pytest.raises(CalibrantError, match="at least two rows"):
        cb.compress(
            llama,
            output=tmp_path / "out",
            recipe=recipe({"name": "qat"}),
            calibration=random_set(llama, samples=1, length=16),
        )
    short = recipe({"name": "zsaq", "length": 65})
    with pytest.raises(CalibrantError, match="reads 64 tokens at most"):
        cb.compress(llama, output=tmp_path / "out", recipe=short)
    text = recipe({"name": "qat", "objective": "text"})
    with pytest.raises(CalibrantError, match="predicts no next tokens"):
        cb.compress(model_folder("bert"), output=tmp_path / "out", recipe=text, allow_encoder=True)
    with pytest.raises(ValueError, match="random inputs need no generator"):
        recipe({"name": "zsaq", "inputs": "random", "temperature": 2.0})
    with pytest.raises(CalibrantError, match="cannot be its own generator"):
        cb.compress(model_folder("bert"), output=tmp_path / "out", recipe=recipe({"name": "zsaq"}), allow_encoder=True)
    assert not list(tmp_path.iterdir())
    (tmp_path / "out.training").mkdir()
    (tmp_path / "out.training" / "notes.txt").write_text("mine")
    with pytest.raises(CalibrantError, match="in the way of the training's journal"):
        cb.compress(llama, output=tmp_path / "out", recipe=recipe({"name": "zsaq"}))
