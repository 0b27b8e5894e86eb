"""A plan knows which share of the blocks' weights it compresses, and names the rest where that is much."""

import json
from pathlib import Path

import pytest
import torch
import transformers as hf

import calibrant as cb
from calibrant.modeling.checkpoint import ModelFolder
from calibrant.modeling.find_blocks import find_blocks
from calibrant.modeling.lazy_model import LazyModel
from calibrant.recipes.make_plan import make_plan
from calibrant.recipes.plan import Plan
from calibrant.recipes.recipe import Recipe
from tests.conftest import random_set, write_tokenizer

ATTENTION = 64 * 64 * 2 + 64 * 32 * 2
MLP = 64 * 96 * 3


def recipe(*ignore: str, group_size: int = 32) -> Recipe:
    weights = {"bits": 4, "group_size": group_size}
    return Recipe.model_validate(
        {"name": "r", "description": "d", "method": {"name": "rtn"}, "scheme": {"weights": weights}, "ignore": ignore}
    )


def plan_of(folder: Path, chosen: Recipe) -> Plan:
    model = LazyModel(ModelFolder(folder), torch.float32, torch.device("cpu"))
    return make_plan(model, find_blocks(model.module), chosen)


@pytest.mark.parametrize(
    ("ignore", "share", "named"),
    [
        ((), 1.0, None),
        (("k_proj",), 1 - 64 * 32 / (ATTENTION + MLP), None),
        (("self_attn",), MLP / (ATTENTION + MLP), "model.layers.*.self_attn.q_proj.weight (13%)"),
        (("mlp",), ATTENTION / (ATTENTION + MLP), "model.layers.*.mlp.gate_proj.weight (20%)"),
        (("layers.0.",), 0.5, "model.layers.*.mlp.up_proj.weight (10%)"),
    ],
)
def test_the_share_is_known_before_the_run(model_folder, ignore: tuple, share: float, named: str | None) -> None:
    plan = plan_of(model_folder("llama"), recipe(*ignore))
    assert plan.share == pytest.approx(share, abs=1e-6)
    warnings = [note for note in plan.notes if note.startswith("only ")]
    assert len(warnings) == (named is not None)
    assert named is None or named in warnings[0]


def test_the_share_is_recorded(model_folder, tmp_path: Path) -> None:
    report = cb.compress(model_folder("llama"), output=tmp_path / "out", recipe=recipe("mlp"), dtype="float32")
    recorded = json.loads((tmp_path / "out" / "calibrant.json").read_text())
    assert report.share == recorded["share"] == pytest.approx(ATTENTION / (ATTENTION + MLP), abs=1e-6)


def saved(config: hf.PretrainedConfig, folder: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = hf.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.ndim > 2:
                torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


SIZE = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16,
        "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip


def test_gates_forbid_no_group_size(tmp_path: Path) -> None:
    config = hf.RecurrentGemmaConfig(**SIZE, intermediate_size=128, block_types=["recurrent", "attention"])
    plan = plan_of(saved(config, tmp_path), recipe(group_size=64))
    assert not plan.fused
    assert any("input_gate_weight" in name for name in plan.left)


def test_experts_of_one_batched_product_see_the_counted_tokens_that_reach_them(tmp_path: Path) -> None:
    config = hf.Llama4TextConfig(
        **SIZE, intermediate_size=64, intermediate_size_mlp=96, num_local_experts=4, moe_layers=[0, 1]
    )
    given = random_set(masked=5)
    chosen = Recipe.model_validate({**recipe().as_written(), "method": {"name": "gptq"}})
    model = saved(config, tmp_path / "model")
    report = cb.compress(model, output=tmp_path / "out", recipe=chosen, calibration=given, dtype="float32")
    assert report.share > 0.98
    for name in ("gate_up_proj", "down_proj"):
        for block in (0, 1):
            seen = [one.tokens for one in report.layers if f"layers.{block}.feed_forward.experts.{name}." in one.name]
            assert len(seen) == 4
            assert sum(seen) == int(given.mask.sum())
