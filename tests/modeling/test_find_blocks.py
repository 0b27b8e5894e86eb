"""Blocks are those that a text runs through once, whatever else a model has lists of."""

from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from calibrant.errors import CalibrantError
from calibrant.modeling.find_blocks import blocks_beside, find_blocks
from calibrant.modeling.structure import fused_parameters

TEXT: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 512,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
LLAMA = hf.LlamaConfig(**TEXT)
EXPERTS = {**TEXT, "moe_intermediate_size": 16}


def made(config: hf.PretrainedConfig, kind: Any = hf.AutoModelForCausalLM) -> hf.PreTrainedModel:
    """A model without values: finding blocks reads none."""
    with torch.device("meta"):
        model: hf.PreTrainedModel = (kind.from_config if kind is hf.AutoModelForCausalLM else kind._from_config)(config)
    for name, buffer in list(model.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner).register_buffer(leaf, torch.ones(buffer.shape, dtype=buffer.dtype))
    return model


WRAPPERS = {
    "gemma3": lambda: (
        hf.Gemma3ForConditionalGeneration,
        hf.Gemma3Config(text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4),
    ),
    "llava": lambda: (
        hf.LlavaForConditionalGeneration,
        hf.LlavaConfig(text_config=LLAMA, vision_config=hf.CLIPVisionConfig(**VISION)),
    ),
    "paligemma": lambda: (
        hf.PaliGemmaForConditionalGeneration,
        hf.PaliGemmaConfig(
            text_config=hf.GemmaConfig(**TEXT), vision_config=hf.SiglipVisionConfig(**VISION, projection_dim=32)
        ),
    ),
    "idefics3": lambda: (
        hf.Idefics3ForConditionalGeneration,
        hf.Idefics3Config(text_config=LLAMA, vision_config=VISION),
    ),
    "mistral3": lambda: (
        hf.Mistral3ForConditionalGeneration,
        hf.Mistral3Config(
            text_config=hf.MistralConfig(**TEXT), vision_config=hf.PixtralVisionConfig(**VISION, head_dim=16)
        ),
    ),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_larger_vision_tower_is_not_taken_for_the_model(name: str) -> None:
    kind, config = WRAPPERS[name]()
    model = made(config, kind)
    blocks = find_blocks(model)
    assert [block.rpartition(".")[2] for block in blocks] == ["0", "1"]
    assert all("vision" not in block for block in blocks)
    assert blocks_beside(model, blocks) == []
    assert all(parameter.device.type == "meta" for parameter in model.parameters())


MIXED = {
    "jamba": lambda: hf.JambaConfig(**TEXT, attn_layer_period=2, attn_layer_offset=1, num_experts=2, mamba_dt_rank=4),
    "bamba": lambda: hf.BambaConfig(
        **TEXT, attn_layer_indices=[1], mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1
    ),
    "recurrent_gemma": lambda: hf.RecurrentGemmaConfig(
        **TEXT, lru_width=32, block_types=["recurrent", "attention"]
    ),
    "lfm2": lambda: hf.Lfm2Config(**TEXT, layer_types=["conv", "full_attention"]),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXED)
def test_a_stack_may_have_blocks_of_several_kinds(name: str) -> None:
    assert len(find_blocks(made(MIXED[name]()))) == 2


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.linear = nn.Linear(8, width, bias=False)
        self.back = nn.Linear(width, 8, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.back(self.linear(hidden_states))


class Toy(hf.PreTrainedModel):
    """A model whose text takes the way ``config.way`` through its lists."""

    config_class = hf.PretrainedConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(16, 8)
        self.first = nn.ModuleList(Block() for _ in range(2))
        self.second = nn.ModuleList(Block(16) for _ in range(2))
        self.unused = nn.ModuleList(Block(64) for _ in range(4))
        if config.way == "shared":
            self.second[1].linear.weight = self.second[0].linear.weight
        self.post_init()

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
        hidden: torch.Tensor = self.embed(input_ids)
        way = self.config.way
        if way == "none":
            return hidden
        if way == "turns":
            for one, other in zip(self.first, self.second, strict=True):
                hidden = other(one(hidden))
            return hidden
        for _ in range(2 if way == "both twice" else 1):
            for block in self.first:
                hidden = block(hidden)
            for _ in range(2 if way in ("second twice", "both twice") else 1):
                for block in self.second:
                    hidden = block(hidden)
                    hidden = hidden * 0.5 if way == "scaled" else hidden
        return hidden


def toy(way: str) -> Toy:
    config = hf.PretrainedConfig()
    config.way, config.vocab_size = way, 16
    return Toy(config)


@pytest.mark.parametrize(("way", "stack", "beside"), [("once", "second", "first"), ("second twice", "first", "second")])
def test_of_several_stacks_the_largest_that_runs_once_is_chosen(way: str, stack: str, beside: str) -> None:
    model = toy(way)
    assert find_blocks(model) == [f"{stack}.0", f"{stack}.1"]
    assert blocks_beside(model, find_blocks(model)) == [f"{beside}.0", f"{beside}.1"]


@pytest.mark.parametrize(
    ("way", "why"),
    [
        ("both twice", "second.0 runs 4 times in a forward pass"),
        ("turns", "first.1 runs between them"),
        ("scaled", "second.1 does not read what second.0 returns"),
        ("shared", "second.1 and second.0 share linear.weight"),
        ("none", "no list of blocks that a text runs through"),
    ],
)
def test_blocks_that_do_not_run_alone_are_refused_with_the_reason(way: str, why: str) -> None:
    with pytest.raises(CalibrantError, match=why):
        find_blocks(toy(way))


MOE = {
    "mixtral": lambda: hf.MixtralConfig(**TEXT, num_local_experts=4),
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(**EXPERTS, num_experts=4, num_experts_per_tok=2),
    "olmoe": lambda: hf.OlmoeConfig(**TEXT, num_experts=4, num_experts_per_tok=2),
    "gpt_oss": lambda: hf.GptOssConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2),
    "llama4": lambda: hf.Llama4TextConfig(**TEXT, num_local_experts=4, intermediate_size_mlp=48, moe_layers=[0, 1]),
    "granitemoe": lambda: hf.GraniteMoeConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2),
    "jetmoe": lambda: hf.JetMoeConfig(**{**TEXT, "num_attention_heads": 4}, kv_channels=16, num_local_experts=4),
}


@pytest.mark.parametrize("name", MOE)
def test_fused_experts_are_known_before_anything_runs(name: str) -> None:
    found = fused_parameters(made(MOE[name]()))
    assert len(found) >= 4
    assert all(parameter.shape[0] == 4 for parameter in found.values())


NO_EXPERTS = {
    "recurrent_gemma": MIXED["recurrent_gemma"],
    "mamba": lambda: hf.MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=1, state_size=8),
    "rwkv": lambda: hf.RwkvConfig(vocab_size=128, hidden_size=32, attention_hidden_size=32, num_hidden_layers=1),
    "zamba": lambda: hf.ZambaConfig(
        **{**TEXT, "num_hidden_layers": 4},
        layers_block_type=["mamba", "hybrid"] * 2,
        attention_hidden_size=64,
        n_mamba_heads=2,
        mamba_dt_rank=4,
    ),
}


@pytest.mark.parametrize("name", NO_EXPERTS)
def test_other_parameters_with_three_dimensions_are_no_experts(name: str) -> None:
    model = made(NO_EXPERTS[name]())
    assert any(parameter.ndim == 3 for parameter in model.parameters())
    assert fused_parameters(model) == {}
