"""Odd architectures: what blocks hand on or share, linears that are called twice, what bfloat16 leaves alone."""

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import calibrant as cb
from calibrant.errors import CalibrantError
from calibrant.modeling.checkpoint import ModelFolder
from calibrant.modeling.lazy_model import LazyModel
from calibrant.modeling.quietly import quietly
from calibrant.modeling.whole_model import load_whole

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # whose scripts import each other by name

from architectures import TOKENS, median_distance, random_set, recipe, tiny_model, walk_distance, write_tokenizer

HAND_ON = {
    "RwkvForCausalLM": "rwkv",
    "ZayaForCausalLM": "zaya",
    "GlmMoeDsaForCausalLM": "glm_moe_dsa",
    "HYV4ForCausalLM": "hy_v4",
}
SHARE = {"ZambaForCausalLM": "zamba", "Zamba2ForCausalLM": "zamba2"}
REPEAT = {"Gemma3nForCausalLM": "gemma3n_text"}
SAID: dict[str, Any] = {
    "name": "r", "description": "d", "method": {"name": "gptq"}, "scheme": {"weights": {"bits": 4}}
}  # fmt: skip
# In bfloat16: gated norms, buffers, a bias of positions, parameters that stay in float32.
BFLOAT16 = {
    "BambaForCausalLM": "bamba",
    "KimiLinearForCausalLM": "kimi_linear",
    "XGLMForCausalLM": "xglm",
    "InklingForCausalLM": "inkling_text",
    "Glm4MoeForCausalLM": "glm4_moe",
}
ALL = {**BFLOAT16, **HAND_ON, **SHARE, **REPEAT}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    def make(architecture: str) -> Path:
        folder = tmp_path_factory.getbasetemp() / architecture
        if not folder.exists():
            with warnings.catch_warnings(), quietly():
                warnings.simplefilter("ignore")
                tiny_model(architecture, ALL[architecture]).save_pretrained(folder)
                write_tokenizer(folder)
        return folder

    return make


def compressed(source: Path, output: Path, bits: int = 4, **options: Any) -> cb.RunReport:
    with quietly():
        return cb.compress(
            source, output=output, recipe=recipe(bits, "gptq"), calibration=random_set(), dtype="float32", **options
        )


@pytest.mark.parametrize("architecture", {**HAND_ON, **SHARE, **REPEAT})
def test_blocks_get_what_the_model_gives_them(architecture: str, model: Callable[[str], Path]) -> None:
    assert walk_distance(model(architecture), architecture) < 1e-4


@pytest.mark.parametrize("architecture", BFLOAT16)
def test_bfloat16_is_that_of_transformers(architecture: str, model: Callable[[str], Path]) -> None:
    assert walk_distance(model(architecture), architecture, torch.bfloat16) < 0.1


def test_what_models_keep_in_float32_is_not_rounded(tmp_path: Path) -> None:
    """A router in float32 among bfloat16 weights."""
    made = tiny_model("Ernie4_5_MoeForCausalLM", "ernie4_5_moe").to(torch.bfloat16)
    name = "model.layers.1.mlp.gate.weight"
    router = torch.randn(made.get_parameter(name).shape, generator=torch.Generator().manual_seed(0))
    made.get_parameter(name).data = router
    made.save_pretrained(tmp_path)
    folder = ModelFolder(tmp_path)
    assert folder.dtype is torch.bfloat16
    lazy = LazyModel(folder, folder.dtype, torch.device("cpu"))
    with lazy.loaded("model.layers.1"):
        lazy.cast("model.layers.1", torch.bfloat16)
        assert torch.equal(lazy.module.get_parameter(name), router)
        assert lazy.module.get_parameter("model.layers.1.mlp.experts.down_proj").dtype is torch.bfloat16


@pytest.mark.parametrize("architecture", {**HAND_ON, **SHARE, **REPEAT})
def test_eight_bits_are_close_to_the_original(architecture: str, model: Callable[[str], Path], tmp_path: Path) -> None:
    compressed(model(architecture), tmp_path / "out", bits=8)
    folders = (ModelFolder(tmp_path / "out", allow_quantized=True), ModelFolder(model(architecture)))
    with torch.no_grad():
        found, wanted = (load_whole(one, "cpu", "float32")(TOKENS[:2], use_cache=False).logits for one in folders)
    assert median_distance(found, wanted) < 0.1


@pytest.mark.parametrize("order", ["two-pass", "independent"])
def test_other_orders_hand_on_too(order: str, model: Callable[[str], Path], tmp_path: Path) -> None:
    source = model("RwkvForCausalLM")
    compressed(source, tmp_path / "out", order=order)
    compressed(source, tmp_path / "sequential")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "sequential"))
    first = "rwkv.blocks.0.attention.key.weight"
    assert torch.equal(one[first], other[first])
    assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("keys", "what"),
    [({"budget": {"choices": [2, 4, 8]}}, "a budget"), ({"drift_correction": 0.5}, "drift_correction")],
)
def test_recipes_that_run_blocks_beside_others_are_refused(
    keys: dict[str, Any], what: str, model: Callable[[str], Path], tmp_path: Path
) -> None:
    chosen = cb.Recipe.model_validate({**SAID, **keys})
    with pytest.raises(CalibrantError, match=f"hand more than hidden states on, which {what} does not follow"):
        cb.prepare(model("RwkvForCausalLM"), output=tmp_path / "out", recipe=chosen, calibration=random_set())


@pytest.mark.parametrize("architecture", SHARE)
def test_shared_weights_stay_as_they_are_and_are_stored_once(
    architecture: str, model: Callable[[str], Path], tmp_path: Path
) -> None:
    source = model(architecture)
    report = compressed(source, tmp_path / "out")
    assert any("since layers share their weights: model.layers.2.shared_transf" in note for note in report.notes)
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    shared = [name for name in before if "shared_transf" in name]
    assert len(shared) > 5
    assert shared == [name for name in after if "shared_transf" in name]
    assert all(torch.equal(before[name], after[name]) for name in shared)
    assert any(name.endswith("weight_packed") for name in after)


def test_linears_that_run_several_times_are_solved_in_two_passes(model: Callable[[str], Path], tmp_path: Path) -> None:
    source = model("Gemma3nForCausalLM")
    report = compressed(source, tmp_path / "out")
    assert [note for note in report.notes if "in two passes" in note] == [
        "altup.modality_router runs several times in a pass: blocks with such a layer are solved in two passes"
    ]
    compressed(source, tmp_path / "two", order="two-pass")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "two"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    chosen = cb.Recipe.model_validate({**SAID, "drift_correction": 0.5})
    with pytest.raises(CalibrantError, match="modality_router runs several times in a pass, so the original model"):
        cb.compress(source, output=tmp_path / "no", recipe=chosen, calibration=random_set())
