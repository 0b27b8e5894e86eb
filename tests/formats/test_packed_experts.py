"""Mixtures of experts come out packed, one linear per expert, as transformers and vLLM read them."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

import calibrant as cb
from calibrant.formats.stored_codes import dense_weights, quantized_linears
from tests.conftest import random_set, write_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "initializer_range": 0.1,
    "pad_token_id": 0,
}
ROUTED: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT: dict[str, Any] = {
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 32,
}  # fmt: skip
# Configuration, and the first linear of an expert of the last layer in its checkpoint.
MODELS: dict[str, tuple[Any, str]] = {
    "mixtral": (
        lambda: hf.MixtralConfig(**SIZES, num_local_experts=4),
        "model.layers.1.block_sparse_moe.experts.3.w1",
    ),
    "qwen3_moe": (
        lambda: hf.Qwen3MoeConfig(**SIZES, **ROUTED, head_dim=16, num_experts=4),
        "model.layers.1.mlp.experts.3.gate_proj",
    ),
    "olmoe": (
        lambda: hf.OlmoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2),
        "model.layers.1.mlp.experts.3.gate_proj",
    ),
    "deepseek_v3": (
        lambda: hf.DeepseekV3Config(
            **SIZES, **ROUTED, **LATENT, n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1
        ),
        "model.layers.1.mlp.experts.3.gate_proj",
    ),
    "phimoe": (
        lambda: hf.PhimoeConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
        "model.layers.1.block_sparse_moe.experts.3.w1",
    ),
    "llama4": (
        lambda: hf.Llama4TextConfig(
            **SIZES, head_dim=16, num_local_experts=4, intermediate_size_mlp=96, interleave_moe_layer_step=1
        ),
        "model.layers.1.feed_forward.experts.3.gate_proj",
    ),
}


def saved(folder: Path, kind: str) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf.AutoModelForCausalLM.from_config(MODELS[kind][0]()).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def reference(output: Path, model: Path, kind: str) -> hf.PreTrainedModel:
    """The model with the weights that the stored codes stand for, loaded without any quantizer."""
    tensors = load_file(output / "model.safetensors")
    settings = json.loads((output / "config.json").read_text())["quantization_config"]
    state = dense_weights(tensors, tensors.__getitem__, settings)
    if kind == "llama4":  # whose dense checkpoints have experts in one tensor, the inputs first
        for layer in range(2):
            place = f"model.layers.{layer}.feed_forward.experts"
            parts = [
                [state.pop(f"{place}.{e}.{part}_proj.weight") for e in range(4)] for part in ("gate", "up", "down")
            ]
            gates, ups, downs = (torch.stack(one).transpose(1, 2) for one in parts)
            state[f"{place}.gate_up_proj"], state[f"{place}.down_proj"] = torch.cat([gates, ups], dim=2), downs
    config = hf.AutoConfig.from_pretrained(model)
    made: hf.PreTrainedModel
    made, found = type(hf.AutoModelForCausalLM.from_config(config)).from_pretrained(
        None, config=config, state_dict=state, dtype=torch.float32, output_loading_info=True
    )
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    return made


def logits(model: hf.PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.arange(4, 60)[None]).logits


@pytest.mark.parametrize("recipe", ["gptq-w4a16-g32", "rtn-fp8a16"])
@pytest.mark.parametrize("kind", MODELS)
def test_every_expert_is_packed_and_loads(tmp_path: Path, kind: str, recipe: str) -> None:
    model, output = saved(tmp_path / "model", kind), tmp_path / "out"
    report = cb.compress(model, recipe=recipe, output=output, calibration=random_set(model, 8, 32))
    tensors = load_file(output / "model.safetensors")
    settings = json.loads((output / "config.json").read_text())["quantization_config"]
    stored = quantized_linears(tensors, settings)
    name = MODELS[kind][1]
    assert name in stored
    # Of a weight, half a byte and a float32 scale for each 32, or a byte and a scale for each row; and the shape.
    rows, columns = (96, 64) if kind in ("mixtral", "olmoe", "llama4", "phimoe") else (32, 64)
    expected = rows * columns // 2 + 4 * rows * columns // 32 + 16 if "w4" in recipe else rows * columns + 4 * rows
    assert sum(tensors[one].nbytes for one in stored[name]) == expected
    # Routers and norms stay, and the embeddings; all matrices of the blocks are packed.
    routers = [one for one in tensors if re.search(r"\.(gate|router)\.", one)]
    assert routers
    original = load_file(model / "model.safetensors")
    assert all(torch.equal(tensors[one], original[one]) for one in routers)
    assert not [one for one in tensors if "expert" in one and one.endswith(".weight") and tensors[one].itemsize > 1]
    assert report.share > 0.97
    wanted = logits(reference(output, model, kind))
    for dequantize in (False, True):
        config = hf.CompressedTensorsConfig(dequantize=dequantize)
        loaded, found = hf.AutoModelForCausalLM.from_pretrained(
            output, dtype=torch.float32, quantization_config=config, output_loading_info=True
        )
        assert not found["missing_keys"]
        assert not found["unexpected_keys"]
        torch.testing.assert_close(logits(loaded), wanted, rtol=1e-4, atol=1e-4)
    assert cb.evaluate(output, against=model, length=32, limit=2).divergence.kl_mean < 0.1


@pytest.mark.parametrize("recipe", ["gptq-w4a16-g32", "gptq-nvfp4a16"])
@pytest.mark.parametrize("kind", MODELS)
def test_outputs_of_mixtures_are_decoded_again(tmp_path: Path, kind: str, recipe: str) -> None:
    model, output = saved(tmp_path / "model", kind), tmp_path / "out"
    cb.compress(model, recipe=recipe, output=output, calibration=random_set(model, 8, 32))
    again: dict[str, Any] = {"recipe": "wanda-50", "calibration": random_set(model, 8, 32), "dequantize": True}
    cb.compress(output, output=tmp_path / "again", **again)
    tensors = load_file(tmp_path / "again" / "model.safetensors")
    assert not any("weight_packed" in name or "weight_scale" in name for name in tensors)
    known = load_file(model / "model.safetensors")
    assert {name: one.shape for name, one in tensors.items()} == {name: one.shape for name, one in known.items()}


@pytest.mark.parametrize("recipe", ["gptq-nvfp4a16", "gptq-mxfp4a16"])
@pytest.mark.parametrize("kind", ["qwen3_moe", "llama4"])
def test_four_bit_floats_of_experts_are_evaluated_with_all_their_scales(tmp_path: Path, kind: str, recipe: str) -> None:
    model, output = saved(tmp_path / "model", kind), tmp_path / "out"
    report = cb.compress(model, recipe=recipe, output=output, calibration=random_set(model, 8, 32))
    # Llama 4's are separate linears in transformers' quantized models, whose scales it keeps.
    wrong = "nvfp4" in recipe and kind == "qwen3_moe"
    assert any("wrong values without a word" in note for note in report.notes) == wrong
    assert ("Do not load this folder with transformers" in (output / "README.md").read_text()) == wrong
    if not wrong:
        proof = cb.prove(output, length=32, windows=1, new_tokens=4, dtype="bfloat16")
        assert proof.difference < 0.1
    assert cb.evaluate(output, against=model, length=32, limit=2).divergence.kl_mean < 0.1


def saved_gpt_oss(folder: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = hf.GptOssConfig(**SIZES, head_dim=16, num_local_experts=4, num_experts_per_tok=2)
        hf.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def test_gpt_oss_has_its_experts_in_its_own_format(tmp_path: Path) -> None:
    model, output = saved_gpt_oss(tmp_path / "model"), tmp_path / "out"
    report = cb.compress(model, recipe="gptq-mxfp4a16", output=output, calibration=random_set(model, 8, 32))
    assert any("own format has its experts in MXFP4 alone: 8 other linears stay" in note for note in report.notes)
    assert report.share > 0.95
    tensors = load_file(output / "model.safetensors")
    place = "model.layers.1.mlp.experts.gate_up_proj"
    assert (tensors[f"{place}_blocks"].shape, tensors[f"{place}_scales"].shape) == ((4, 192, 2, 16), (4, 192, 2))
    original = load_file(model / "model.safetensors")
    kept = [name for name in tensors if not name.endswith(("_blocks", "_scales"))]
    assert all(torch.equal(tensors[name], original[name]) for name in kept)
    # transformers' own loader reads the experts.
    proof = cb.prove(output, length=24, windows=1, new_tokens=8)
    assert proof.difference < 1e-5
    assert cb.evaluate(output, against=model, length=32, limit=2).divergence.kl_mean < 0.1


def test_experts_that_stay_dense_keep_the_whole_model_dense(tmp_path: Path) -> None:
    model = saved(tmp_path / "model", "mixtral")
    recipe = copy.deepcopy(cb.builtin_recipes()["rtn-w8a16"].model_dump()) | {"ignore": ["experts"]}
    report = cb.compress(model, recipe=cb.Recipe.model_validate(recipe), output=tmp_path / "out")
    assert any("left as it is, beside which no packed layer is loaded" in note for note in report.notes)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize(("kind", "options", "said"), [
    ("mixtral", {"checkpoint_format": "gptq"}, "is fused, which the gptq format has no names for"),
    ("mixtral", {"recipe": "rtn-fp8"}, "quantized activations do not go with"),
])  # fmt: skip
def test_what_no_loader_takes_is_refused(tmp_path: Path, kind: str, options: dict[str, str], said: str) -> None:
    model = saved(tmp_path / "model", kind)
    with pytest.raises(cb.CalibrantError, match=said):
        cb.compress(model, output=tmp_path / "no", **{"recipe": "rtn-w8a16", **options})
    assert not (tmp_path / "no").exists()


def weights(**said: Any) -> cb.Recipe:
    method = {"name": "r", "description": "d", "method": {"name": "rtn"}}
    return cb.Recipe.model_validate({**method, "scheme": {"weights": said.pop("weights")}, **said})


@pytest.mark.parametrize(
    ("kind", "recipe", "options", "said"),
    [
        ("qwen3_moe", {"weights": {"bits": 4, "group_size": 32, "symmetric": False}}, {}, "experts with zero points"),
        ("gpt_oss", {"weights": {"type": "mxfp4"}, "ignore": [r"layers\.0\."]}, {}, "all experts in MXFP4"),
        ("gpt_oss", {"weights": {"type": "mxfp4"}}, {"checkpoint_format": "gptq"}, "leave out gptq"),
    ],
)
def test_what_no_engine_loads_is_refused_before_any_work(
    kind: str, recipe: dict[str, Any], options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    model = saved_gpt_oss(tmp_path / "model") if kind == "gpt_oss" else saved(tmp_path / "model", kind)
    with pytest.raises(cb.CalibrantError, match=said):
        cb.prepare(model, recipe=weights(**recipe), output=tmp_path / "out", **options)


def test_split_experts_may_have_zero_points(tmp_path: Path) -> None:
    model = saved(tmp_path / "model", "llama4")
    recipe = weights(weights={"bits": 4, "group_size": 32, "symmetric": False})
    cb.compress(model, recipe=recipe, output=tmp_path / "out")
    assert cb.prove(tmp_path / "out", length=24, windows=1, new_tokens=4).agrees
