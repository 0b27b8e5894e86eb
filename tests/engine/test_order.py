"""Blocks whose rows reach their stages in different orders: the fallback to two passes, and where there is none."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import calibrant as cb
from tests.conftest import random_set

# Rows of this length take the other way; the probe has another one.
ODD_LENGTH = 21
Forward = Callable[..., torch.Tensor]


def two_lengths(model: Path) -> cb.CalibrationSet:
    """Eight rows, of which two end after ``ODD_LENGTH`` counted tokens."""
    whole = random_set(model)
    mask = whole.mask.clone()
    mask[3:5, ODD_LENGTH:] = False
    return cb.CalibrationSet.build(whole.tokens, mask, whole.manifest)


def attention(layer: Any, hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    found: torch.Tensor = layer.self_attn(hidden_states=layer.input_layernorm(hidden), **kwargs)[0]
    return found


def parallel(layer: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """Attention beside the MLP; which of them runs first depends on the length."""
    if hidden_states.shape[1] == ODD_LENGTH:
        inside = layer.mlp(layer.post_attention_layernorm(hidden_states))
        return hidden_states + attention(layer, hidden_states, kwargs) + inside
    beside = attention(layer, hidden_states, kwargs)
    return hidden_states + beside + layer.mlp(layer.post_attention_layernorm(hidden_states))


def late(layer: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """Attention, then the MLP, whose last linear runs once more at its beginning in rows of the odd length."""
    after = hidden_states + attention(layer, hidden_states, kwargs)
    hidden_states = layer.post_attention_layernorm(after)
    if hidden_states.shape[1] == ODD_LENGTH:
        after = after + layer.mlp.down_proj(torch.zeros(*hidden_states.shape[:2], 96))
    return after + layer.mlp(hidden_states)


def compress(
    model: Path, output: Path, recipe: str | cb.Recipe, order: str = "sequential"
) -> tuple[cb.RunReport, dict[str, torch.Tensor]]:
    options: dict[str, Any] = {"recipe": recipe, "calibration": two_lengths(model), "order": order}
    report = cb.compress(model, output=output, dtype="float32", **options)
    return report, load_file(output / "model.safetensors")


def test_a_block_of_different_orders_is_solved_in_two_passes(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaDecoderLayer, "forward", parallel)
    report, found = compress(llama, tmp_path / "fallback", "gptq-w4a16-g32")
    said = [note for note in report.notes if "in different orders, solved in two passes" in note]
    assert [note.split(":")[0] for note in said] == ["model.layers.0", "model.layers.1"]
    plain, wanted = compress(llama, tmp_path / "two-pass", "gptq-w4a16-g32", order="two-pass")
    assert not any("different orders" in note for note in plain.notes)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_rows_of_one_order_need_no_fallback(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaDecoderLayer, "forward", parallel)
    report = cb.compress(llama, output=tmp_path / "out", recipe="gptq-w4a16-g32", calibration=random_set(llama))
    assert not any("different orders" in note for note in report.notes)


def test_where_the_inputs_are_gone_the_run_says_which_order_works(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaDecoderLayer, "forward", late)
    with pytest.raises(cb.CalibrantError, match='different orders; run again with `order="two-pass"`'):
        compress(llama, tmp_path / "out", "gptq-w4a16-g32")
    assert not (tmp_path / "out").exists()
    compress(llama, tmp_path / "out", "gptq-w4a16-g32", order="two-pass")


def test_drift_cannot_be_corrected_there(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaDecoderLayer, "forward", parallel)
    with pytest.raises(cb.CalibrantError, match="different orders, so the original model cannot run beside it"):
        compress(llama, tmp_path / "out", "best-w4a16")
