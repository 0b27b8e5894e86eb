"""ZSAQ's generator: its gradient, its inputs, what it learns."""

from pathlib import Path
from typing import Any

import pytest
import torch

from calibrant.modeling.checkpoint import ModelFolder
from calibrant.modeling.losses import divergences
from calibrant.modeling.whole_model import load_whole
from calibrant.training.generator import Generator, read_embeddings
from calibrant.training.train_model import zsaq_step
from calibrant.training.train_steps import ZsaqStep
from tests.conftest import random_set
from tests.training.common import CPU, recipe, student


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
        found: torch.Tensor = generator(ids, torch.Generator().manual_seed(1))
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
    step = zsaq(llama, generator_learning_rate=3e-3)
    ids = random_set(samples=4, length=16).tokens.long()
    apart = [step.ascend(ids, torch.Generator().manual_seed(number)) for number in range(40)]
    assert sum(apart[-8:]) > 1.1 * sum(apart[:8])


def test_the_generators_gradient_is_clipped(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("calibrant.training.train_steps.LARGEST_GRADIENT", 1e-6)
    step = zsaq(llama)
    step.ascend(random_set(samples=4, length=16).tokens.long(), torch.Generator().manual_seed(0))
    moments = [one["exp_avg"].norm() for one in step.state()["ascent"]["state"].values()]
    # Adam's first moment of a first step is a tenth of the gradient.
    assert float(torch.stack(moments).norm()) == pytest.approx(1e-7, rel=1e-3)


def test_special_tokens_are_no_seeds(llama: Path) -> None:
    chosen = recipe({"name": "zsaq"})
    teacher = load_whole(ModelFolder(llama), "cpu", "float32")
    step = zsaq_step(ModelFolder(llama), student(llama, chosen), teacher, chosen.training, CPU)  # type: ignore[arg-type]
    assert step.eligible.tolist() == list(range(4, 99))


def test_a_frozen_generator_stays(llama: Path) -> None:
    for rate, stays in ((0.0, True), (1e-3, False)):
        step = zsaq(llama, generator_learning_rate=rate)
        assert step.generator is not None
        before = [parameter.detach().clone() for parameter in step.generator.parameters()]
        step.step(0, 1.0)
        after = list(step.generator.parameters())
        assert stays == all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
