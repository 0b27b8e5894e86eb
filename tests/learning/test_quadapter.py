"""Quadapter's first phase on small models whose outlier channels are known, since they were planted."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import calibrant as cb
from calibrant.compression.recipe import Recipe
from calibrant.errors import CalibrantError
from tests.conftest import random_set

PLANTED = (3, 17, 40)
FACTOR = 48.0
BEHIND = {"input_layernorm": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]}
BEHIND |= {"post_attention_layernorm": ["mlp.gate_proj", "mlp.up_proj"]}


def recipe(*transforms: dict[str, object], **scheme: object) -> Recipe:
    wanted = scheme or {"weights": {"bits": 8}, "activations": {"bits": 8, "dynamic": False}}
    return Recipe.model_validate(
        {
            "name": "r",
            "description": "d",
            "transforms": list(transforms),
            "method": {"name": "rtn"},
            "scheme": wanted,
        }
    )


@pytest.fixture
def planted(llama: Path, tmp_path: Path) -> Path:
    """The same function as ``llama``, with some channels behind the norms much larger than the others."""
    folder = shutil.copytree(llama, tmp_path / "planted")
    tensors = load_file(folder / "model.safetensors")
    scale = torch.ones(64)
    scale[list(PLANTED)] = FACTOR
    for block in range(2):
        for norm, linears in BEHIND.items():
            tensors[f"model.layers.{block}.{norm}.weight"] *= scale
            for linear in linears:
                tensors[f"model.layers.{block}.{linear}.weight"] /= scale
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def logits(folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        found: torch.Tensor = model(random_set(samples=6, seed=5).tokens.long()).logits
    return found


def error(folder: Path, original: Path) -> float:
    """Squared change of the logits."""
    return float((logits(folder) - logits(original)).square().mean())


def test_planted_outliers_are_found_and_their_harm_is_undone(planted: Path, llama: Path, tmp_path: Path) -> None:
    torch.testing.assert_close(logits(planted), logits(llama), rtol=1e-3, atol=1e-4)
    data = random_set(planted, samples=16)
    for name, transforms in {"rtn": [], "quadapter": [{"name": "quadapter"}]}.items():
        cb.compress(planted, output=tmp_path / name, recipe=recipe(*transforms), calibration=data, dtype="float32")
    cb.compress(llama, output=tmp_path / "clean", recipe=recipe(), calibration=data, dtype="float32")
    harmed, healed, clean = (error(tmp_path / name, llama) for name in ("rtn", "quadapter", "clean"))
    assert harmed - healed >= 0.9 * (harmed - clean)
    before, after = (load_file(path / "model.safetensors") for path in (planted, tmp_path / "quadapter"))
    for block in range(2):
        for norm in BEHIND:
            name = f"model.layers.{block}.{norm}.weight"
            alpha = after[name].float() / before[name].float()
            assert set(alpha.argsort()[: len(PLANTED)].tolist()) == set(PLANTED)
            assert bool((alpha > 0).all())


def test_no_step_to_speak_of_is_round_to_nearest(llama: Path, tmp_path: Path) -> None:
    for name, transforms in {"rtn": [], "still": [{"name": "quadapter", "steps": 1, "learning_rate": 1e-12}]}.items():
        cb.compress(llama, output=tmp_path / name, recipe=recipe(*transforms), calibration=random_set(llama))
    plain, still = (load_file(tmp_path / name / "model.safetensors") for name in ("rtn", "still"))
    assert plain.keys() == still.keys()
    assert all(torch.equal(plain[name], still[name]) for name in plain)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2", "opt"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_architectures_learn_scales_for_weights_too(
    model_folder, tmp_path: Path, architecture: str, dtype: str
) -> None:
    chosen = recipe({"name": "quadapter", "steps": 40}, weights={"bits": 3})
    model = model_folder(architecture)
    cb.compress(model, output=tmp_path / "out", recipe=chosen, calibration=random_set(model), dtype=dtype)
    notes = json.loads((tmp_path / "out" / "calibrant.json").read_text())["notes"]
    assert any("quadapter scales moved:" in note and "nowhere" not in note for note in notes)


def test_dynamic_activations_and_one_row_are_enough(planted: Path, tmp_path: Path) -> None:
    dynamic = {"weights": {"bits": 8}, "activations": {"bits": 8}}
    data = random_set(planted, samples=1)
    for name, transforms in {"rtn": [], "quadapter": [{"name": "quadapter"}]}.items():
        cb.compress(planted, output=tmp_path / name, recipe=recipe(*transforms, **dynamic), calibration=data)
    assert error(tmp_path / "quadapter", planted) < error(tmp_path / "rtn", planted)


def test_the_same_command_gives_the_same_bytes(planted: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        chosen = recipe({"name": "quadapter", "steps": 20})
        cb.compress(planted, output=tmp_path / name, recipe=chosen, calibration=random_set(planted))
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b"))
    assert first == second


def test_fused_experts_are_refused(model_folder, tmp_path: Path) -> None:
    model = model_folder("mixtral")
    with pytest.raises(CalibrantError, match="quadapter learns no scales for"):
        cb.compress(
            model,
            output=tmp_path / "out",
            recipe=recipe({"name": "quadapter"}, weights={"bits": 4}),
            calibration=random_set(model),
        )


def test_other_transforms_do_not_go_with_it() -> None:
    with pytest.raises(ValueError, match="leave other transforms out"):
        recipe({"name": "quadapter"}, {"name": "smoothquant"})
