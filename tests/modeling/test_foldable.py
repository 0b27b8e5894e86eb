"""Scales move only where the block's function stays the same."""

import pytest
import torch

from calibrant.modeling.block_walk import BlockWalk
from calibrant.modeling.checkpoint import ModelFolder
from calibrant.modeling.find_blocks import find_blocks
from calibrant.modeling.foldable import FoldablePair, find_foldable
from calibrant.modeling.lazy_model import LazyModel

LLAMA = [
    "input_layernorm -> q_proj k_proj v_proj",
    "post_attention_layernorm -> gate_proj up_proj",
    "up_proj -> down_proj",
]
EXPECTED = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "gemma3": [
        "input_layernorm -> q_proj k_proj v_proj",
        "pre_feedforward_layernorm -> gate_proj up_proj",
        "up_proj -> down_proj",
    ],
    "olmo2": ["up_proj -> down_proj"],
    "gpt2": ["ln_1 -> c_attn", "ln_2 -> c_fc"],
    "opt": [
        "self_attn_layer_norm -> q_proj k_proj v_proj",
        "v_proj -> out_proj",
        "final_layer_norm -> fc1",
        "fc1 -> fc2",
    ],
    "phi": ["input_layernorm -> q_proj k_proj v_proj fc1", "v_proj -> dense"],
}


def described(pair: FoldablePair) -> str:
    consumers = [linear.name.split(".")[-1] for linear in pair.group.linears]
    return f"{pair.producer.name.split('.')[-1]} -> {' '.join(consumers)}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", EXPECTED)
def test_the_pairs_of_known_architectures(model_folder, architecture: str, dtype: torch.dtype) -> None:
    model = LazyModel(ModelFolder(model_folder(architecture)), dtype, torch.device("cpu"))
    blocks = find_blocks(model.module)
    with torch.inference_mode(), BlockWalk(model, blocks, None, dtype).opened(0) as opened:
        block = opened.module
        # Random norms: with gains of one, different forms of a norm look alike.
        generator = torch.Generator().manual_seed(0)
        for parameter in block.parameters():
            if parameter.ndim == 1:
                parameter.data.add_(torch.randn(parameter.shape, generator=generator).to(dtype) * 0.2)
        before = {name: value.clone() for name, value in block.state_dict().items()}
        output = opened.run(opened.probe)
        pairs = find_foldable(opened)
        assert [described(pair) for pair in pairs] == EXPECTED[architecture]
        assert all(torch.equal(before[name], value) for name, value in block.state_dict().items())
        for pair in pairs:
            scale = torch.rand(pair.group.linears[0].in_features, generator=generator) * 3 + 0.3
            pair.fold({name: parameter.data for name, parameter in block.named_parameters()}, scale)
        after = opened.run(opened.probe)
        limit = 1e-5 if dtype is torch.float32 else 3e-2
        assert (after.float() - output.float()).norm() <= limit * output.float().norm()
        folded = block.state_dict()
        assert all(not torch.equal(before[name], folded[name]) for pair in pairs for name in pair.changed())
