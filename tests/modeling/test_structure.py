import pytest
import torch

from calibrant.modeling.block_walk import BlockWalk
from calibrant.modeling.checkpoint import ModelFolder
from calibrant.modeling.find_blocks import find_blocks
from calibrant.modeling.lazy_model import LazyModel
from calibrant.modeling.structure import Experts, InputGroup
from calibrant.modeling.token_rows import TokenRows
from calibrant.progress import NoProgress
from calibrant.recipes.recipe import load_recipe
from tests.conftest import ARCHITECTURES, random_set

GATED = ["q_proj k_proj v_proj", "o_proj", "gate_proj up_proj", "down_proj"]
EXPECTED = {
    "llama": GATED, "mistral": GATED, "qwen2": GATED, "qwen3": GATED, "gemma2": GATED, "gemma3": GATED, "olmo2": GATED,
    "phi": ["q_proj k_proj v_proj fc1", "dense", "fc2"],
    "gpt2": ["c_attn", "c_proj", "c_fc", "c_proj"],
    "opt": ["q_proj k_proj v_proj", "out_proj", "fc1", "fc2"],
    "gpt_neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "bloom": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "falcon": ["query_key_value dense_h_to_4h", "dense", "dense_4h_to_h"],
    "mixtral": ["q_proj k_proj v_proj", "o_proj", "experts: gate_up_proj down_proj"],
    "qwen3_moe": ["q_proj k_proj v_proj", "o_proj", "experts: gate_up_proj down_proj"],
    "bert": ["query key value", "dense", "dense", "dense"],
    "bert_mlm": ["query key value", "dense", "dense", "dense"],
}  # fmt: skip


def described(stage: InputGroup | Experts) -> str:
    if isinstance(stage, InputGroup):
        return " ".join(linear.name.rpartition(".")[2] for linear in stage.linears)
    return "experts: " + " ".join(group[0].parameter.rpartition(".")[2] for group in stage.groups)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_blocks_and_groups_are_found_and_blocks_replay(model_folder, architecture: str) -> None:
    folder = ModelFolder(model_folder(architecture), allow_encoder=True)
    model = LazyModel(folder, torch.float32, torch.device("cpu"))
    blocks = find_blocks(model.module)
    assert len(blocks) == 2
    given = random_set()
    recipe, structures = load_recipe("wanda-2:4"), []
    with torch.inference_mode():
        walk = BlockWalk(model, blocks, TokenRows(given.tokens, given.mask), torch.float32)
        for block in walk.visit("walking", NoProgress()):
            kept = block.structure.without(lambda linear, block=block: recipe.ignores(f"{block.name}.{linear}"))
            structures.append([described(stage) for stage in kept.stages])
            assert block.structure.unseen == ()
            block.advance()
    # Only the groups count: parallel attention (Falcon and others) reads equal tensors in another order.
    assert structures == [EXPECTED[architecture]] * 2

    whole = type(ARCHITECTURES[architecture]()).from_pretrained(folder.path).eval()
    captured = []
    whole.get_submodule(blocks[-1]).register_forward_hook(lambda m, a, out: captured.append(out))
    with torch.no_grad():
        whole(input_ids=random_set().tokens.long())
    last = captured[0][0] if isinstance(captured[0], tuple) else captured[0]
    torch.testing.assert_close(walk.batches[0].hidden, last, rtol=1e-5, atol=1e-6)


def test_weights_of_blocks_are_loaded_only_when_needed(model_folder) -> None:
    model = LazyModel(ModelFolder(model_folder("llama")), torch.float32, torch.device("cpu"))
    assert all(parameter.device.type == "meta" for parameter in model.module.parameters())
    with model.loaded("model.layers.1") as block:
        assert all(parameter.device.type == "cpu" for parameter in block.parameters())
        assert model.module.model.layers[0].mlp.up_proj.weight.device.type == "meta"
    assert all(parameter.device.type == "meta" for parameter in model.module.parameters())
