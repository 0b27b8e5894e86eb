"""Quantized keys and values: what scales cover, and that transformers rounds with compressed-tensors as we do."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

import calibrant as cb
from calibrant.errors import CalibrantError
from calibrant.formats.kv_cache import kv_cache_layout
from calibrant.modeling.checkpoint import ModelFolder
from calibrant.modeling.dequantized_model import load_dequantized
from calibrant.modeling.input_rounding import round_inputs
from calibrant.modeling.whole_model import load_whole
from tests.conftest import random_set, write_tokenizer

from ..pipeline.test_write_gguf import write

HEADS = 2
TOKENS = torch.randint(3, 90, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kv") / "model"
    config = hf.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=HEADS,
        vocab_size=100, initializer_range=0.3, pad_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf.LlamaForCausalLM(config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def recipe(weights: dict[str, Any], cache: dict[str, Any], **keys: Any) -> cb.Recipe:
    scheme = {"weights": weights, "kv_cache": cache}
    return cb.Recipe.model_validate(
        {"name": "r", "description": "d", "method": {"name": "rtn"}, "scheme": scheme} | keys
    )


def compressed(model: Path, output: Path, cache: dict[str, Any], **settings: Any) -> Path:
    chosen = recipe({"type": "fp8"}, cache)
    cb.compress(model, recipe=chosen, calibration=random_set(), output=output, dtype="float32", **settings)
    return output


@pytest.mark.parametrize("granularity", ["tensor", "head"])
@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_transformers_rounds_as_we_do(kind: str, granularity: str, model: Path, tmp_path: Path) -> None:
    output = compressed(model, tmp_path / "out", {"type": kind, "granularity": granularity})
    scales = load_file(output / "model.safetensors")
    assert scales["model.layers.1.self_attn.k_scale"].shape == ((1,) if granularity == "tensor" else (HEADS, 1, 1))
    theirs = hf.AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    assert torch.equal(theirs.model.layers[1].self_attn.v_scale, scales["model.layers.1.self_attn.v_scale"])
    folder = ModelFolder(output, allow_quantized=True)
    ours = load_dequantized(folder, torch.device("cpu"), torch.float32)
    with torch.inference_mode():
        unrounded = ours(TOKENS).logits
        round_inputs(ours, folder)
        rounded, expected = ours(TOKENS).logits, theirs(TOKENS).logits
        evaluated = load_whole(folder, "cpu", "float32")(TOKENS).logits
    assert (rounded - unrounded).abs().max() > 1e-3
    torch.testing.assert_close(rounded, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(evaluated, expected, atol=1e-4, rtol=1e-4)


def test_a_text_goes_on_from_a_rounded_cache(model: Path, tmp_path: Path) -> None:
    folder = ModelFolder(compressed(model, tmp_path / "out", {}), allow_quantized=True)
    ours = load_dequantized(folder, torch.device("cpu"), torch.float32)
    with torch.inference_mode():
        unrounded = ours(TOKENS).logits[:, -1]
    round_inputs(ours, folder)
    with torch.inference_mode():
        begun = ours(TOKENS[:, :-1], use_cache=True)
        cached = ours(TOKENS[:, -1:], past_key_values=begun.past_key_values).logits[:, -1]
        torch.testing.assert_close(cached, ours(TOKENS).logits[:, -1], atol=1e-4, rtol=1e-4)
    assert (cached - unrounded).abs().max() > 1e-3


@pytest.mark.parametrize("order", ["sequential", "two-pass", "independent"])
def test_scales_cover_the_largest_of_counted_tokens(order: str, model: Path, tmp_path: Path) -> None:
    """Against keys and values that a reference takes from the whole compressed model."""
    counted = random_set(masked=16)
    output = tmp_path / "out"
    cb.compress(
        model, recipe=recipe({"type": "fp8"}, {"type": "int8", "granularity": "head"}), calibration=counted,
        output=output, dtype="float32", order=order,
    )  # fmt: skip
    reference = load_dequantized(ModelFolder(output, allow_quantized=True), torch.device("cpu"), torch.float32)
    with torch.inference_mode():
        kept = reference(counted.tokens, use_cache=True).past_key_values
    stored = load_file(output / "model.safetensors")
    seen = counted.mask.bool()[:, None, :, None]
    # Blocks after the first get other inputs where nothing is propagated.
    for index in range(1 if order == "independent" else 2):
        for part, values in (("k", kept.layers[index].keys), ("v", kept.layers[index].values)):
            largest = (values * seen).abs().amax((0, 2, 3))
            scale = stored[f"model.layers.{index}.self_attn.{part}_scale"].flatten()
            torch.testing.assert_close(scale * 127, largest, atol=1e-4, rtol=1e-4)


def test_config_says_it_as_compressed_tensors_does(model: Path, tmp_path: Path) -> None:
    output = compressed(model, tmp_path / "out", {"granularity": "head"})
    settings = json.loads((output / "config.json").read_text())["quantization_config"]
    assert settings["kv_cache_scheme"] == {
        "num_bits": 8, "type": "float", "symmetric": True, "strategy": "attn_head", "dynamic": False,
    }  # fmt: skip
    with pytest.raises(CalibrantError, match="not read here"):
        kv_cache_layout({"kv_cache_scheme": {**settings["kv_cache_scheme"], "num_bits": 4}})
    with pytest.raises(CalibrantError, match="not read here"):
        kv_cache_layout({"kv_cache_scheme": ["fp8"]})


def test_decoding_leaves_no_scale_behind(model: Path, tmp_path: Path) -> None:
    first = compressed(model, tmp_path / "first", {})
    cb.compress(first, recipe="rtn-w8a16", output=tmp_path / "second", dequantize=True, dtype="float32")
    assert not [name for name in load_file(tmp_path / "second" / "model.safetensors") if name.endswith("k_scale")]


@pytest.mark.parametrize(
    ("format_name", "said"), [("gptq", "gptq format has no place"), ("gguf", "gguf format has no place")]
)
def test_formats_without_a_place_refuse(format_name: Any, said: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrantError, match=said):
        cb.compress(
            model, recipe=recipe({"bits": 4, "group_size": 32}, {}), calibration=random_set(), output=tmp_path / "out",
            checkpoint_format=format_name,
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_gguf_file_leaves_the_scales_out(tmp_path: Path) -> None:
    """llama.cpp has settings of its own for keys and values."""
    pytest.importorskip("xllamacpp", reason="xllamacpp, which runs llama.cpp, is not installed")
    model, output = write(tmp_path / "model"), tmp_path / "out"
    hf.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float16).save_pretrained(model)
    cb.compress(model, recipe=recipe({"bits": 8}, {}), calibration=random_set(model, 8, 32), output=output)
    found = cb.write_gguf(output, output=tmp_path / "model.gguf")
    assert any("keys and values in a type of its own" in note for note in found.notes)
    assert cb.prove(output, engine="llama.cpp", length=24, windows=1, new_tokens=4).agrees


def test_recipes_that_cannot_are_refused() -> None:
    with pytest.raises(ValueError, match="goes with quantized weights"):
        recipe({}, {}, scheme={"sparsity": "2:4", "kv_cache": {}})
    with pytest.raises(ValueError, match="trains the model"):
        recipe({"bits": 8}, {}, method={"name": "qat"})


def test_models_whose_attention_is_not_known_refuse(tmp_path: Path) -> None:
    config = hf.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=100, n_positions=64)
    hf.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    write_tokenizer(tmp_path / "gpt2")
    with pytest.raises(CalibrantError, match="leave kv_cache out"):
        cb.compress(
            tmp_path / "gpt2", recipe=recipe({"bits": 8}, {}), calibration=random_set(), output=tmp_path / "out"
        )
