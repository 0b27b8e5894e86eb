"""Whole runs that train, from a recipe to the file that is loaded again."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import calibrant as cb
from calibrant.calibration.calibration_set import CalibrationSet
from calibrant.errors import CalibrantError
from calibrant.modeling.checkpoint import ModelFolder
from calibrant.modeling.find_blocks import find_blocks
from calibrant.modeling.lazy_model import LazyModel
from calibrant.modeling.token_rows import TokenRows
from calibrant.modeling.whole_model import load_whole
from calibrant.recipes.make_plan import make_plan
from calibrant.recipes.recipe import Recipe, load_recipe
from calibrant.training import train_model
from calibrant.training.learned_range import see_inputs
from calibrant.training.rounded_model import RoundedModel
from calibrant.training.train_steps import TextStep
from tests.checkpoints import loaded_divergence
from tests.conftest import random_set, write_model
from tests.training.common import CPU, W4A8, recipe


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
    # A loss this small is a difference of terms near one: float32 leaves it an absolute error, which depends on the
    # width of the processor's vectors.
    assert parts["training"]["loss"] == pytest.approx(
        whole["training"]["loss"], rel=1e-4 if architecture == "llama" else 5e-3, abs=2e-7
    )
    for name, value in load_file(tmp_path / "whole" / "model.safetensors").items():
        other = load_file(tmp_path / "parts" / "model.safetensors")[name]
        if "packed" not in name:
            torch.testing.assert_close(other, value, rtol=1e-3, atol=1e-4)


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
    chosen = recipe({**training, **LONGER}, weights={"bits": 3}, activations={"dynamic": True})
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
        {"weights": {"bits": 4, "range_search": "mse"}, "activations": {"dynamic": True}},
        {"weights": {"bits": 2, "group_size": 32}, "activations": {"dynamic": True}},
        {"weights": {"bits": 8}, "activations": {"dynamic": False}},
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
    assert not (tmp_path / "out.journal").exists()


@pytest.mark.parametrize("architecture", ["gpt2", "falcon"])
def test_what_is_stored_dense_is_trained_in_the_files_dtype(tmp_path: Path, architecture: str) -> None:
    """Loaders read these values themselves, not codes."""
    model = write_model(tmp_path / "model", architecture, torch.bfloat16)
    opened = ModelFolder(model)
    lazy = LazyModel(opened, opened.dtype, CPU)
    plan = make_plan(lazy, find_blocks(lazy.module), recipe({"name": "qat"}, weights={"bits": 8}))
    assert plan.target.layout is None
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


def test_inputs_that_are_one_tensor_have_one_range(model_folder, tmp_path: Path) -> None:
    static = {"weights": {"bits": 8}, "activations": {"dynamic": False}}
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
    static = {"weights": {"bits": 8}, "activations": {"dynamic": False}}
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
    rows = TokenRows(torch.ones(2, 5, 3), torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(CalibrantError, match="linear: is given other rows than the tokens"):
        see_inputs(pooled, ["linear"], [rows], causal=True)
    monkeypatch.setattr(RoundedModel, "input_grids", lambda _: {})
    static = {"weights": {"bits": 8}, "activations": {"dynamic": False}}
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
        name: json.loads((tmp_path / name / "calibrant.json").read_text())["recipe"]["method"]["seed"]
        for name in ("none", "one")
    }
    assert seeds == {"none": 7, "one": 5}
    changed = load_recipe("zsaq-w4a8").with_weights(2, None).with_seed(7)
    assert changed.training is not None
    assert changed.training.seed == 7
    with pytest.raises(CalibrantError, match="must be 0 or more"):
        cb.compress(llama, output=tmp_path / "none", recipe=recipe({"name": "zsaq"}), seed=-1, overwrite=True)


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
    with pytest.raises(CalibrantError, match="cannot write its own calibration set"):
        cb.compress(folder, recipe=recipe({"name": "qat"}), **options)


def test_refusals(llama: Path, model_folder, tmp_path: Path) -> None:
    for scheme, others, said in (
        ({**W4A8, "activations": {"dynamic": False}}, {}, "zsaq has no data"),
        (W4A8, {"transforms": [{"name": "smoothquant"}]}, "leave transforms and budget out"),
        ({"weights": {"bits": 4, "range_search": "clip"}}, {}, "needs weights with range_search none or mse"),
        ({"sparsity": "2:4"}, {}, "zsaq trains rounded weights"),
    ):
        value = {"name": "r", "description": "d", "method": {"name": "zsaq"}, "scheme": scheme}
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
    (tmp_path / "out.journal").mkdir()
    (tmp_path / "out.journal" / "notes.txt").write_text("mine")
    with pytest.raises(CalibrantError, match="in the way of the run's journal"):
        cb.compress(llama, output=tmp_path / "out", recipe=recipe({"name": "zsaq"}))
