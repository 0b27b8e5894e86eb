"""Block reconstruction: what learns and what stays, and that the stored model is nearer to the original for it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import calibrant as cb
from calibrant.errors import CalibrantError
from calibrant.modeling.checkpoint import ModelFolder
from calibrant.modeling.whole_model import load_whole
from calibrant.quantization.grids import GridSpec, trained_scale
from tests.checkpoints import loaded_divergence
from tests.conftest import random_set, write_model

PRUNED: dict[str, Any] = {"method": {"name": "sparsegpt"}, "scheme": {"sparsity": "0.6"}}
QUANTIZED: dict[str, Any] = {
    "method": {"name": "gptq"},
    "scheme": {"weights": {"bits": 2, "group_size": 32, "range_search": "clip", "signed_scales": True}},
}


def recipe(said: dict[str, Any], **more: Any) -> cb.Recipe:
    return cb.Recipe.model_validate({"name": "x", "description": "x", **said, **more})


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight micro-batches of the random set's 64 rows."""
    monkeypatch.setattr("calibrant.modeling.entry.MICRO_BATCH_TOKENS", 256)


def outputs(model: Path, folder: Path, said: dict[str, Any], **options: Any) -> list[Path]:
    """One without reconstruction and one with."""
    found = []
    for name, more in (("plain", {}), ("reconstructed", {"reconstruction": {"epochs": 8}})):
        found.append(folder / name)
        cb.compress(
            model, output=found[-1], recipe=recipe(said, **more), calibration=random_set(model, samples=64),
            dtype="float32", **options,
        )  # fmt: skip
    return found


def layers(output: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((output / "calibrant.json").read_text())["layers"]
    return found


@pytest.mark.parametrize("said", [PRUNED, QUANTIZED], ids=["pruned", "quantized"])
def test_the_model_comes_nearer_to_the_original(llama: Path, tmp_path: Path, said: dict[str, Any]) -> None:
    plain, reconstructed = outputs(llama, tmp_path, said)
    shares = [layer["reconstructed"] for layer in layers(reconstructed)]
    assert max(shares) <= 1
    assert min(shares) < 0.97
    assert all(layer["reconstructed"] is None for layer in layers(plain))
    rows = random_set(llama, samples=64, seed=1).tokens.long()
    assert loaded_divergence(reconstructed, llama, rows) < loaded_divergence(plain, llama, rows)


def test_zeros_stay_and_kept_weights_learn(llama: Path, tmp_path: Path) -> None:
    plain, reconstructed = (load_file(folder / "model.safetensors") for folder in outputs(llama, tmp_path, PRUNED))
    changed = 0
    for name, value in plain.items():
        if "layers.0." not in name or "proj" not in name:
            if "layers" not in name or "norm" in name:
                assert torch.equal(value, reconstructed[name]), name
            continue
        # Zeros are chosen before anything of the first block is learned.
        assert torch.equal(value == 0, reconstructed[name] == 0), name
        changed += not torch.equal(value, reconstructed[name])
    assert changed == 7


def test_codes_stay_and_scales_learn_without_a_change_of_sign(llama: Path, tmp_path: Path) -> None:
    plain, reconstructed = (load_file(folder / "model.safetensors") for folder in outputs(llama, tmp_path, QUANTIZED))
    first = [name for name in plain if "layers.0." in name]
    for name in (name for name in first if name.endswith("weight_packed")):
        assert torch.equal(plain[name], reconstructed[name]), name
    scales = [name for name in first if name.endswith("weight_scale")]
    assert len(scales) == 7
    for name in scales:
        assert not torch.equal(plain[name], reconstructed[name]), name
        assert torch.equal(plain[name].sign(), reconstructed[name].sign()), name


@pytest.mark.parametrize("bits", [8, 3])
def test_the_recorded_error_is_that_of_the_stored_block(tmp_path: Path, bits: int) -> None:
    """At 8 bits the steps of bfloat16 scales are larger than what there is to learn."""
    model = write_model(tmp_path / "model", "llama", torch.bfloat16)
    said = {"method": {"name": "gptq"}, "scheme": {"weights": {"bits": bits, "group_size": 32}}}
    plain, reconstructed = outputs(model, tmp_path, said)
    held_out = random_set(model, samples=64).tokens[:8].long()
    target = behind_first_block(model, held_out)
    first, second = (
        ((behind_first_block(folder, held_out) - target).square().sum(-1) / target.square().sum(-1)).mean()
        for folder in (plain, reconstructed)
    )
    recorded = layers(reconstructed)[0]["reconstructed"]
    assert recorded <= 1
    assert float(second / first) == pytest.approx(recorded, rel=5e-3)


def behind_first_block(folder: Path, rows: torch.Tensor) -> torch.Tensor:
    loaded = load_whole(ModelFolder(folder, allow_quantized=True), "cpu", "float32")
    with torch.no_grad():
        found: torch.Tensor = loaded(input_ids=rows, output_hidden_states=True).hidden_states[1]
    return found


def test_a_scale_that_would_not_stay_one_keeps_its_value() -> None:
    spec = GridSpec(4, True, 32, torch.float16, signed_scales=True)
    before = torch.tensor([[2.0**-24, 3e4, 1.0, -1.0, 1.0, 1.0]])
    learned = torch.tensor([[0.4 * 2.0**-24, 7e4, -0.1, 0.2, torch.nan, 1.2501]])
    expected = torch.tensor([[2.0**-24, 3e4, 1.0, -1.0, 1.0, 1.25]])
    assert torch.equal(trained_scale(learned, before, spec), expected)


def test_an_ignored_layer_stays(llama: Path, tmp_path: Path) -> None:
    _, reconstructed = outputs(llama, tmp_path, {**PRUNED, "ignore": ["down_proj"]})
    original, found = load_file(llama / "model.safetensors"), load_file(reconstructed / "model.safetensors")
    for name in (name for name in found if "down_proj" in name):
        assert torch.equal(found[name], original[name]), name


def test_one_micro_batch_is_enough(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("calibrant.modeling.entry.MICRO_BATCH_TOKENS", 1 << 20)
    _, reconstructed = outputs(llama, tmp_path, PRUNED)
    assert min(layer["reconstructed"] for layer in layers(reconstructed)) < 1


@pytest.mark.parametrize("name", ["gpt2", "opt", "qwen3", "gemma3"])
def test_other_architectures(model_folder: Any, tmp_path: Path, name: str) -> None:
    model = model_folder(name)
    _, reconstructed = outputs(model, tmp_path, PRUNED)
    assert min(layer["reconstructed"] for layer in layers(reconstructed)) < 1


def test_bfloat16_learns_attention_too(model_folder: Any, tmp_path: Path) -> None:
    """The faster attention in bfloat16 has no gradients: trainings take another one."""
    model, folders = model_folder("opt"), []
    for name, more in (("plain", {}), ("learned", {"reconstruction": {}})):
        folders.append(tmp_path / name)
        cb.compress(
            model, output=folders[-1], recipe=recipe(PRUNED, **more), calibration=random_set(model, samples=64),
            dtype="bfloat16",
        )  # fmt: skip
    plain, learned = (load_file(folder / "model.safetensors") for folder in folders)
    for name in ("q_proj", "k_proj", "v_proj"):
        key = f"model.decoder.layers.0.self_attn.{name}.weight"
        assert not torch.equal(plain[key], learned[key]), name


@pytest.mark.parametrize(
    "said",
    [
        {"method": {"name": "2ssp"}, "scheme": {"sparsity": "0.25"}},
        {"method": {"name": "adpq"}, "scheme": {"weights": {"bits": 4, "group_size": 32}}},
        {"method": {"name": "gptq"}, "scheme": {"weights": {"bits": 8}, "activations": {"dynamic": True}}},
        {"method": {"name": "gptq"}, "scheme": {"weights": {"type": "fp8"}}},
        {"method": {"name": "qat"}, "scheme": {"weights": {"bits": 4}}},
    ],
    ids=["2ssp", "adpq", "activations", "fp8", "qat"],
)
def test_what_leaves_nothing_to_learn_is_refused(said: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="reconstruction"):
        recipe(said, reconstruction={})


def test_it_needs_the_sequential_order(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrantError, match="reconstructs blocks, which needs"):
        cb.compress(
            llama, output=tmp_path / "out", recipe=recipe(PRUNED, reconstruction={}), calibration=random_set(llama),
            order="two-pass",
        )  # fmt: skip


def test_a_step_takes_as_many_rows_as_its_tokens_hold(llama: Path, tmp_path: Path) -> None:
    """Steps beyond a micro-batch are micro-batches; smaller ones are other steps, which learn too."""
    found = {}
    for tokens in (32, 256, 4096):
        said = recipe(PRUNED, reconstruction={"epochs": 2, "step_tokens": tokens})
        folder = tmp_path / str(tokens)
        cb.compress(llama, output=folder, recipe=said, calibration=random_set(llama, samples=64), dtype="float32")
        found[tokens] = (folder / "model.safetensors").read_bytes()
        assert min(layer["reconstructed"] for layer in layers(folder)) < 1
    assert found[256] == found[4096]
    assert found[32] != found[256]
