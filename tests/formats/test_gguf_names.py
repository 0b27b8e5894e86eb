"""Layers' names in the GGUF file that llama.cpp's converter makes of a model."""

import numpy as np
import pytest
import transformers as hf

from calibrant.errors import CalibrantError
from calibrant.formats.gguf_names import GgufNames, gguf_names


def name(config: hf.PretrainedConfig, *layers: str) -> GgufNames:
    return gguf_names(config, 2, {layer: layer for layer in layers})


@pytest.mark.parametrize(
    ("config", "architecture", "names"),
    [
        (hf.MistralConfig(), "llama", {"model.layers.1.mlp.up_proj": ["ffn_up"]}),
        (hf.Qwen2Config(), "qwen2", {"model.layers.1.self_attn.q_proj": ["attn_q"]}),
        (hf.Qwen3Config(), "qwen3", {"model.layers.1.self_attn.o_proj": ["attn_output"]}),
        (hf.Gemma2Config(), "gemma2", {"model.layers.1.mlp.down_proj": ["ffn_down"]}),
        (hf.Gemma3TextConfig(), "gemma3", {"model.language_model.layers.1.mlp.gate_proj": ["ffn_gate"]}),
        (hf.LlamaConfig(), "llama", {"model.text_model.layers.1.self_attn.v_proj": ["attn_v"]}),
        (hf.LlamaConfig(), "llama", {"language_model.model.layers.1.self_attn.k_proj": ["attn_k"]}),
        (hf.Phi3Config(pad_token_id=0), "phi3", {"model.layers.1.mlp.gate_up_proj": ["ffn_up"]}),
        (hf.Phi3Config(pad_token_id=0), "phi3", {"model.layers.1.self_attn.qkv_proj": ["attn_qkv"]}),
        (hf.PhiConfig(), "phi2", {"model.layers.1.mlp.fc2": ["ffn_down"]}),
        (hf.GPT2Config(), "gpt2", {"transformer.h.1.attn.c_attn": ["attn_qkv"]}),
        (hf.BloomConfig(), "bloom", {"transformer.h.1.self_attention.query_key_value": ["attn_qkv"]}),
        (hf.GPTNeoXConfig(), "gptneox", {"gpt_neox.layers.1.mlp.dense_h_to_4h": ["ffn_up"]}),
        (hf.Lfm2Config(), "lfm2", {"model.layers.1.conv.in_proj": ["shortconv.in_proj"]}),
        (hf.Olmo3Config(), "olmo2", {"model.layers.1.mlp.up_proj": ["ffn_up"]}),
        (hf.CohereConfig(), "command-r", {"model.layers.1.mlp.up_proj": ["ffn_up"]}),
        (hf.DeepseekV2Config(), "deepseek2", {"model.layers.1.self_attn.q_proj": ["attn_q"]}),
        (hf.NemotronHConfig(), "nemotron_h_moe", {"backbone.layers.1.mixer.in_proj": ["ssm_in"]}),
        (hf.NemotronHConfig(), "nemotron_h_moe", {"model.layers.1.mixer.experts.up_proj": ["ffn_up_exps"]}),
        (hf.MixtralConfig(), "llama", {"model.layers.1.mlp.experts.gate_up_proj": ["ffn_gate_exps", "ffn_up_exps"]}),
        (
            hf.Qwen3NextConfig(),
            "qwen3next",
            {
                "model.layers.1.mlp.experts.gate_up_proj": ["ffn_gate_exps", "ffn_up_exps"],
                "model.layers.1.linear_attn.in_proj_qkvz": ["attn_qkv", "attn_gate"],
            },
        ),
        (hf.Gemma4TextConfig(), "gemma4", {"model.layers.1.experts.gate_up_proj": ["ffn_gate_up_exps"]}),
        (hf.Mistral4Config(), "mistral4", {"model.layers.1.mlp.experts.gate_up_proj": ["ffn_gate_up_exps"]}),
        (
            hf.GraniteMoeHybridConfig(num_local_experts=0),
            "granitehybrid",
            {
                "model.layers.1.shared_mlp.input_linear": ["ffn_gate", "ffn_up"],
                "model.layers.1.shared_mlp.output_linear": ["ffn_down"],
            },
        ),
        (
            hf.GraniteMoeHybridConfig(num_local_experts=4),
            "granitehybrid",
            {
                "model.layers.1.shared_mlp.input_linear": ["ffn_gate_shexp", "ffn_up_shexp"],
                "model.layers.1.shared_mlp.output_linear": ["ffn_down_shexp"],
            },
        ),
    ],
)
def test_names_are_those_of_the_architecture_that_the_converter_takes(
    config: hf.PretrainedConfig, architecture: str, names: dict[str, list[str]]
) -> None:
    found = name(config, *names)
    assert found.architecture == architecture
    assert not found.guessed
    assert not found.left_out
    assert not found.notes()
    assert {layer: [one.name for one in tensors] for layer, tensors in found.tensors.items()} == {
        layer: [f"blk.1.{tensor}.weight" for tensor in tensors] for layer, tensors in names.items()
    }


def test_the_checkpoints_name_of_a_weight_goes_first() -> None:
    layer = "model.layers.0.self_attn.forget_gate.f_a_proj"
    found = gguf_names(hf.KimiLinearConfig(), 2, {layer: "model.layers.0.self_attn.f_a_proj.weight"})
    assert [one.name for one in found.tensors[layer]] == ["blk.0.ssm_f_a.weight"]


def test_columns_that_the_converter_reorders() -> None:
    heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 6, "linear_value_head_dim": 2}
    layer = "model.layers.0.linear_attn.out_proj"
    (tensor,) = name(hf.Qwen3_5TextConfig(**heads), layer).tensors[layer]
    sums, tokens = tensor.rows(np.arange(12.0)[None], np.array([[7]]))
    assert sums.tolist() == [[0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]]
    assert tokens.tolist() == [[7]]


def test_layers_without_a_name_are_left_out_and_said() -> None:
    found = name(hf.LlamaConfig(), "model.layers.0.mlp.up_proj", "model.layers.0.self_attn.g_proj")
    assert list(found.tensors) == ["model.layers.0.mlp.up_proj"]
    assert found.left_out == ("model.layers.0.self_attn.g_proj",)
    (sentence,) = found.notes()
    assert "model.layers.0.self_attn.g_proj" in sentence


def test_a_model_type_that_is_not_known_gets_the_names_of_llama_and_says_so() -> None:
    found = name(hf.HeliumConfig(), "model.layers.0.mlp.up_proj")
    assert found.guessed
    assert found.architecture == "llama"
    assert "not known" in found.notes()[0]


@pytest.mark.parametrize(
    ("config", "layer", "reason"),
    [
        (hf.OPTConfig(), "model.decoder.layers.0.self_attn.k_proj", "is not known"),
        (hf.CTRLConfig(), "transformer.h.0.multi_head_attention.Wq", "is not known"),
        (hf.BartConfig(), "model.decoder.layers.0.fc1", "is not known"),
        (hf.LlamaConfig(), "model.layers.0.self_attn.g_proj", "architecture llama"),
    ],
)
def test_a_matrix_without_any_name_is_refused_for_the_reason_that_holds(
    config: hf.PretrainedConfig, layer: str, reason: str
) -> None:
    with pytest.raises(CalibrantError, match=reason) as refused:
        name(config, layer)
    assert layer in str(refused.value)
    assert "has no name" not in str(refused.value)
