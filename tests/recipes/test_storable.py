"""What transformers does not load packed is stored dense with the reason; what no text reaches stays as it is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import calibrant as cb
from calibrant.errors import CalibrantError
from calibrant.modeling.checkpoint import ModelFolder
from calibrant.modeling.find_blocks import find_blocks
from calibrant.modeling.lazy_model import LazyModel
from calibrant.recipes.make_plan import make_plan
from calibrant.recipes.recipe import Recipe
from tests.conftest import write_tokenizer

IDS: dict[str, Any] = {"vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZE: dict[str, Any] = {**IDS, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GATED: dict[str, Any] = {**SIZE, "num_key_value_heads": 4, "intermediate_size": 96}
DECODER: dict[str, Any] = {**IDS, "d_model": 64, "decoder_layers": 2, "decoder_attention_heads": 4,
                           "decoder_ffn_dim": 96, "encoder_layers": 1, "is_decoder": True}  # fmt: skip
RECIPE = Recipe.model_validate(
    {
        "name": "r",
        "description": "d",
        "method": {"name": "rtn"},
        "scheme": {"weights": {"bits": 8, "group_size": 32}},
    }
)
INITIALIZED, MADE, ORDINARY = "initialization reads", "made of other tensors", "not an ordinary linear layer"

UNPACKABLE: dict[str, tuple[Any, str]] = {
    "xlstm": (lambda: hf.xLSTMConfig(**IDS, hidden_size=64, num_heads=2, num_blocks=1), INITIALIZED),
    "mamba": (lambda: hf.MambaConfig(**IDS, hidden_size=64, num_hidden_layers=2, time_step_rank=32), INITIALIZED),
    "olmo_hybrid": (
        lambda: hf.OlmoHybridConfig(
            **GATED, layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2,
            linear_num_value_heads=2, linear_key_head_dim=16, linear_value_head_dim=32,
        ),
        MADE,
    ),
    "gpt2": (lambda: hf.GPT2Config(**IDS, n_embd=64, n_layer=2, n_head=4), ORDINARY),
    "falcon": (lambda: hf.FalconConfig(**SIZE), ORDINARY),
    "gpt_oss": (lambda: hf.GptOssConfig(**GATED, head_dim=16, num_local_experts=4), "fused in checkpoints too"),
}  # fmt: skip


def saved(config: hf.PretrainedConfig, folder: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.mark.parametrize("name", UNPACKABLE)
def test_what_loads_is_written(name: str, tmp_path: Path) -> None:
    config, why = UNPACKABLE[name]
    model = saved(config(), tmp_path / "model")
    report = cb.compress(model, output=tmp_path / "out", recipe=RECIPE, dtype="float32")
    assert any(why in note and "stored dense" in note for note in report.notes)
    tokens = torch.arange(4, 12)[None]
    loaded, info = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    original = hf.AutoModelForCausalLM.from_pretrained(model)
    assert not info["missing_keys"]
    with torch.no_grad():
        found, wanted = (one(input_ids=tokens, use_cache=False).logits for one in (loaded, original))
    assert 0 < (found - wanted).norm() < 0.1 * wanted.norm()


def test_other_formats_refuse_with_the_reason(tmp_path: Path) -> None:
    config, why = UNPACKABLE["olmo_hybrid"]
    model = saved(config(), tmp_path / "model")
    with pytest.raises(CalibrantError, match=f"{why}.*so no gptq checkpoint is written"):
        cb.prepare(model, output=tmp_path / "out", recipe=RECIPE, checkpoint_format="gptq")


CROSS: dict[str, Any] = {
    "bart": lambda: hf.BartConfig(**DECODER),
    "mbart": lambda: hf.MBartConfig(**DECODER),
    "pegasus": lambda: hf.PegasusConfig(**DECODER),
    "marian": lambda: hf.MarianConfig(**{**DECODER, "decoder_start_token_id": 1}),
    "whisper": lambda: hf.WhisperConfig(**DECODER),
}


@pytest.mark.parametrize("name", CROSS)
def test_layers_that_no_text_reaches_are_not_planned(name: str, tmp_path: Path) -> None:
    model = LazyModel(ModelFolder(saved(CROSS[name](), tmp_path)), torch.float32, torch.device("cpu"))
    plan = make_plan(model, find_blocks(model.module), RECIPE)
    assert plan.layers
    assert not any("encoder_attn" in layer for layer in plan.layers)
    assert any("encoder_attn" in weight for weight in plan.left)
    attention, mlp = 4 * 64 * 64, 2 * 64 * 96
    assert plan.share == pytest.approx((attention + mlp) / (2 * attention + mlp), abs=1e-6)
    assert any("a text does not run through them" in note and "encoder_attn" in note for note in plan.notes)


def test_inputs_that_transformers_rounds_by_one_scale_are_said(
    model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    said = "rounds all by one scale"
    plan = cb.prepare(model_folder("opt"), output=tmp_path / "out", recipe="rtn-w8a8").plan
    assert [note for note in plan.notes if said in note and note.startswith("model.decoder.layers.0.fc1")]
    static = cb.prepare(model_folder("opt"), output=tmp_path / "out", recipe="rtn-w8a8-static").plan
    other = cb.prepare(model_folder("llama"), output=tmp_path / "out", recipe="rtn-w8a8").plan
    assert not [note for note in [*static.notes, *other.notes] if said in note]
