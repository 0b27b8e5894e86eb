"""FP8, MXFP4 and NVFP4 checkpoints: compressed-tensors decodes the bytes to our values and rounds inputs as we do."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme, QuantizationStatus
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from safetensors.torch import load_file

import calibrant as cb
from calibrant.formats.stored_codes import dense_weights, quantized_linears, settings_of
from calibrant.modeling.checkpoint import ModelFolder
from calibrant.modeling.dequantized_model import load_dequantized
from calibrant.modeling.input_rounding import round_inputs
from calibrant.modeling.whole_model import load_whole
from calibrant.recipes.recipe import builtin_recipes
from tests.conftest import random_set, write_tokenizer

# Recipe, format, bytes of a linear [256, 128] and of its scales.
RECIPES = {
    "rtn-fp8": ("float-quantized", 256 * 128 + 4 * 256),
    "gptq-fp8": ("float-quantized", 256 * 128 + 4 * 256),
    "rtn-fp8-block": ("float-quantized", 256 * 128 + 4 * 2),
    "gptq-fp8-static": ("float-quantized", 256 * 128 + 4 + 4),
    "gptq-w4afp8": ("pack-quantized", 256 * 64 + 4 * 256 + 16),
    "gptq-mxfp4a16": ("mxfp4-pack-quantized", 256 * 64 + 256 * 4),
    "gptq-mxfp4": ("mxfp4-pack-quantized", 256 * 64 + 256 * 4),
    "gptq-nvfp4a16": ("nvfp4-pack-quantized", 256 * 64 + 256 * 8 + 4),
    "gptq-nvfp4": ("nvfp4-pack-quantized", 256 * 64 + 256 * 8 + 4 + 4),
    "rtn-nvfp4a16-four-over-six": ("nvfp4-pack-quantized", 256 * 64 + 256 * 8 + 4),
}
LINEAR = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("float") / "model", hidden_size=128, intermediate_size=256)


def write_llama(folder: Path, **sizes: int) -> Path:
    """With one head, so that every matrix has the sizes given."""
    config = hf.LlamaConfig(
        **sizes, num_hidden_layers=2, num_attention_heads=1, vocab_size=100, initializer_range=0.1, pad_token_id=None
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf.LlamaForCausalLM(config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def outputs(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("outputs")
    for recipe in RECIPES:
        cb.compress(model, recipe=recipe, output=folder / recipe, calibration=random_set(model, 8, 32))
    return {recipe: folder / recipe for recipe in RECIPES}


def opened(output: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    settings = json.loads((output / "config.json").read_text())["quantization_config"]
    return load_file(output / "model.safetensors"), settings


def weights_of(tensors: dict[str, torch.Tensor], settings: dict[str, Any]) -> torch.Tensor:
    return dense_weights(tensors, tensors.__getitem__, settings)[f"{LINEAR}.weight"]


def scheme_of(settings: dict[str, Any]) -> QuantizationScheme:
    return QuantizationScheme.model_validate({**settings_of(LINEAR, settings), "targets": ["Linear"]})


@pytest.mark.parametrize("recipe", RECIPES)
def test_compressed_tensors_decodes_the_values_that_are_ours(outputs: dict[str, Path], recipe: str) -> None:
    tensors, settings = opened(outputs[recipe])
    name, size = RECIPES[recipe]
    assert settings["format"] == name
    stored = quantized_linears(tensors, settings)
    assert len(stored) == 14
    assert sum(tensors[one].nbytes for one in stored[LINEAR]) == size
    parts = {one.rpartition(".")[2]: tensors[one] for one in stored[LINEAR]}
    decoded = BaseCompressor.get_value_from_registry(name).decompress(parts, scheme_of(settings))["weight"]
    ours = weights_of(tensors, settings)
    assert torch.equal(decoded, ours.to(decoded.dtype))
    # Four-bit floats are decoded in bfloat16 there, the rest exactly.
    assert decoded.dtype is (torch.bfloat16 if "fp4" in name else torch.float32)


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_loaded_computes_with_the_stored_values(outputs: dict[str, Path], recipe: str) -> None:
    """Inputs are rounded as compressed-tensors does it, layer by layer."""
    tensors, settings = opened(outputs[recipe])
    weight = weights_of(tensors, settings)
    model = load_whole(ModelFolder(outputs[recipe], allow_quantized=True), "cpu", "float32")
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    linear = model.get_submodule(LINEAR)
    # Before hooks and wrappers that round.
    model.get_submodule("model.layers.1.post_attention_layernorm").register_forward_hook(
        lambda _, __, output: seen.append((output, output))
    )
    linear.register_forward_hook(lambda _, __, output: seen.append((output, output)))
    with torch.inference_mode():
        model(torch.arange(3, 40)[None])
    inputs, outputs_seen = seen[0][0], seen[1][0]
    scheme = scheme_of(settings)
    if scheme.input_activations is not None:
        linear = torch.nn.Linear(128, 256)
        linear.quantization_status = QuantizationStatus.FROZEN
        for part in ("input_scale", "input_global_scale"):
            if f"{LINEAR}.{part}" in tensors:
                setattr(linear, part, tensors[f"{LINEAR}.{part}"])
        inputs = forward_quantize(linear, inputs, "input", scheme.input_activations)
    torch.testing.assert_close(outputs_seen, inputs @ weight.T, rtol=1e-4, atol=1e-4)


def test_gptq_and_searches_beat_rounding(model: Path, outputs: dict[str, Path], tmp_path: Path) -> None:
    def error(output: Path) -> float:
        layers = cb.RunRecord.read(output).layers
        return sum(layer.relative_error for layer in layers) / len(layers)

    given_ = random_set(model, 8, 32)
    for kind in ("mxfp4", "nvfp4", "fp8"):
        found = {}
        for method, search in (("rtn", "none"), ("rtn", "importance"), ("gptq", "importance")):
            if kind == "fp8" and search == "importance" and method == "rtn":
                continue
            weights = {"type": kind, "range_search": "clip" if search == "none" else search}
            recipe = {"name": "x", "description": "x", "method": {"name": method}, "scheme": {"weights": weights}}
            output = tmp_path / f"{kind}-{method}-{search}"
            cb.compress(model, recipe=cb.Recipe.model_validate(recipe), output=output, calibration=given_)
            found[method, search] = error(output)
        assert found["gptq", "importance"] < 0.7 * found["rtn", "none"]


def test_the_choice_of_four_or_six_lowers_the_error_of_weights(model: Path, tmp_path: Path) -> None:
    errors = {}
    for search in ("none", "four-over-six"):
        recipe = builtin_recipes()["rtn-nvfp4a16-four-over-six"].model_dump()
        recipe["scheme"]["weights"]["range_search"] = search
        report = cb.compress(model, recipe=cb.Recipe.model_validate(recipe), output=tmp_path / search)
        errors[search] = [layer.relative_error for layer in report.layers]
    assert all(better < plain for better, plain in zip(errors["four-over-six"], errors["none"], strict=True))


@pytest.mark.parametrize("recipe", ["gptq-mxfp4", "gptq-nvfp4", "rtn-fp8"])
def test_zeros_and_huge_inputs_are_rounded_to_finite_values(outputs: dict[str, Path], recipe: str) -> None:
    model = load_dequantized(ModelFolder(outputs[recipe], allow_quantized=True), torch.device("cpu"), torch.float32)
    round_inputs(model, ModelFolder(outputs[recipe], allow_quantized=True))
    given_ = torch.cat([torch.zeros(1, 128), torch.full((1, 128), 1e30), torch.full((1, 128), 1e-30)])
    assert bool(model.get_submodule(LINEAR)(given_).isfinite().all())


@pytest.mark.parametrize("recipe", [*(one for one in RECIPES if "fp4" not in one), "rtn-w8a8", "rtn-w8a8-static"])
def test_models_are_the_same_whoever_decodes_them(
    outputs: dict[str, Path], model: Path, recipe: str, tmp_path: Path
) -> None:
    """Decoded here, or by transformers and compressed-tensors."""
    output = outputs.get(recipe, tmp_path / "out")
    if recipe not in outputs:
        cb.compress(model, recipe=recipe, output=output, calibration=random_set(model, 8, 32))
    tokens = torch.arange(3, 40)[None]
    theirs = hf.AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    folder = ModelFolder(output, allow_quantized=True)
    ours = load_dequantized(folder, torch.device("cpu"), torch.float32)
    round_inputs(ours, folder)
    with torch.inference_mode():
        one, other = (found(tokens).logits.float() for found in (ours, theirs))
    assert (one - other).norm() < 1e-3 * one.norm()


@pytest.mark.parametrize(("scheme", "said"), [
    ({"weights": {"type": "fp8", "bits": 4}}, "fp8 weights have 8 bits"),
    ({"weights": {"type": "nvfp4", "group_size": 32}}, "nvfp4 weights have 4 bits, groups of 16"),
    ({"weights": {"type": "mxfp4", "symmetric": False}}, "no zero points"),
    ({"weights": {"bits": 4, "granularity": "block"}}, "granularity tensor or block is for the type fp8"),
    ({"weights": {"bits": 4, "range_search": "four-over-six"}}, "for the types mxfp4 and nvfp4"),
    ({"weights": {"type": "fp8"}, "activations": {}}, "int8 activations do not go with fp8 weights"),
    ({"weights": {"type": "mxfp4"}, "activations": {"type": "nvfp4"}}, "nvfp4 activations do not go with mxfp4"),
    ({"weights": {"bits": 8}, "activations": {"type": "fp8"}}, "need 4 bits, symmetric, in groups"),
    ({"weights": {"type": "fp8"}, "activations": {"type": "fp8", "dynamic": False}}, "granularity: tensor"),
    ({"weights": {"type": "nvfp4"}, "activations": {"type": "nvfp4", "dynamic": False}}, "find their scales at run"),
    ({"weights": {"type": "fp8", "granularity": "block"}, "activations": {"type": "fp8", "dynamic": False}},
     "weights in blocks have dynamic activations"),
])  # fmt: skip
def test_schemes_that_no_engine_has_are_refused(scheme: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        cb.Recipe.model_validate({"name": "x", "description": "x", "method": {"name": "rtn"}, "scheme": scheme})


@pytest.mark.parametrize("method", ["hqq", "adpq", "spqr", "qat", "zsaq"])
def test_methods_for_integers_refuse_floats(method: str) -> None:
    scheme = {"weights": {"type": "nvfp4"}}
    with pytest.raises(ValueError, match=r"integers|symmetric: false|needs weights"):
        cb.Recipe.model_validate({"name": "x", "description": "x", "method": {"name": method}, "scheme": scheme})


def test_what_does_not_fit_is_refused_before_any_work(model: Path, tmp_path: Path) -> None:
    small = write_llama(tmp_path / "small", hidden_size=64, intermediate_size=96)
    with pytest.raises(cb.CalibrantError, match=r"blocks of 128 x 128 do not divide model\.layers\.0"):
        cb.compress(small, recipe="rtn-fp8-block", output=tmp_path / "no")
    with pytest.raises(cb.CalibrantError, match="gptq format is for integers"):
        cb.compress(model, recipe="gptq-nvfp4a16", output=tmp_path / "no", checkpoint_format="gptq")
    with pytest.raises(cb.CalibrantError, match="nvfp4 weights have 4 bits"):
        cb.compress(model, recipe="gptq-nvfp4a16", bits=8, output=tmp_path / "no")
    assert not (tmp_path / "no").exists()
