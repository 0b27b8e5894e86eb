"""Models that also take images: the language tower is compressed, everything else stays byte for byte, and the output
loads as the class that it was."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors import safe_open

import calibrant as cb
from calibrant.modeling.checkpoint import ModelFolder
from calibrant.modeling.dequantized_model import load_dequantized
from calibrant.modeling.input_rounding import round_inputs
from tests.conftest import random_set, write_tokenizer

from ..modeling.test_find_blocks import VISION, WRAPPERS

QWEN = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6]},
}  # fmt: skip
VISION_OF_QWEN = {"hidden_size": 32, "intermediate_size": 64, "depth": 2, "num_heads": 2, "out_hidden_size": 64}
LOADED = WRAPPERS | {
    "qwen2_5_vl": lambda: (
        hf.Qwen2_5_VLForConditionalGeneration,
        hf.Qwen2_5_VLConfig(text_config=QWEN, vision_config=VISION_OF_QWEN, image_token_id=120),
    ),
}
RECIPES = ["gptq-w4a16", "rtn-w8a8", "rtn-fp8-kv-fp8", "wanda-50"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("multimodal")

    def saved(name: str) -> Path:
        if not (folder / name).exists():
            kind, config = LOADED[name]()
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = kind(config)
                for parameter in model.parameters():
                    torch.nn.init.normal_(parameter, std=0.1)
            model.save_pretrained(folder / name)
            write_tokenizer(folder / name)
        return folder / name

    return saved


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", LOADED)
def test_only_the_language_tower_changes(name: str, recipe: str, models: Callable[[str], Path], tmp_path: Path) -> None:
    source, output = models(name), tmp_path / "out"
    chosen = cb.builtin_recipes()[recipe]
    if chosen.scheme.weights is not None and chosen.scheme.weights.group_size:
        chosen = chosen.with_weights(None, 16)
    report = cb.compress(source, recipe=chosen, calibration=random_set(), output=output, dtype="float32")
    assert report.share > 0.9
    before, after = tensors(source), tensors(output)
    solved = {layer.name for layer in report.layers}
    changed = [one for one in before if one not in after or not same(before[one], after[one])]
    assert len(changed) == len(solved)
    assert sum("vis" in one for one in before) > 5
    assert not [one for one in changed if "vis" in one or "projector" in one or "norm" in one]
    kind = LOADED[name]()[0]
    loaded = kind.from_pretrained(output, dtype=torch.float32).eval()
    folder = ModelFolder(output, allow_quantized=True)
    tokens = torch.randint(4, 99, (1, 12), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        logits = loaded(input_ids=tokens).logits
        if folder.quantization is not None:
            ours = load_dequantized(folder, torch.device("cpu"), torch.float32)
            round_inputs(ours, folder)
            torch.testing.assert_close(ours(input_ids=tokens).logits, logits, atol=1e-3, rtol=1e-3)
        original = kind.from_pretrained(source, dtype=torch.float32).eval()
        assert not torch.allclose(original(input_ids=tokens).logits, logits, atol=1e-6)


@pytest.mark.parametrize("name", LOADED)
def test_such_models_write_their_own_data_and_are_evaluated(
    name: str, models: Callable[[str], Path], tmp_path: Path
) -> None:
    source, output = models(name), tmp_path / "out"
    made = cb.generate(source, samples=2, length=16)
    assert made.tokens.shape == (2, 16)
    budget = {"choices": [2, 4], "average": 3}
    said = {"name": "r", "description": "d", "method": {"name": "gptq"}, "budget": budget}
    chosen = cb.Recipe.model_validate({**said, "scheme": {"weights": {"bits": 4, "group_size": 16}}})
    report = cb.compress(source, recipe=chosen, calibration=random_set(), output=output)
    assert {layer.bits for layer in report.layers} == {2, 4}
    result = cb.evaluate(output, against=source, length=16, limit=2)
    assert result.divergence is not None
    assert 0 < result.divergence.kl_mean < 1e9


def test_an_image_is_read_as_before(models: Callable[[str], Path], tmp_path: Path) -> None:
    """The vision tower and its projection give the same features in the output."""
    source, output = models("gemma3"), tmp_path / "out"
    chosen = cb.builtin_recipes()["gptq-w4a16"].with_weights(None, 16)
    cb.compress(source, recipe=chosen, calibration=random_set(), output=output)
    size: Any = VISION["image_size"]
    pixels = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    kind = hf.Gemma3ForConditionalGeneration
    with torch.inference_mode():
        features = [kind.from_pretrained(one).eval().get_image_features(pixels) for one in (source, output)]
    assert torch.equal(features[0].pooler_output, features[1].pooler_output)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found
