"""Linears that no text reaches, and linears whose weights something else reads, are known before a weight is loaded."""

from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from calibrant.modeling.find_blocks import find_blocks
from calibrant.modeling.linear_use import LinearUse, linear_use


class Block(nn.Module):
    """Its text takes the way ``way``; ``used`` is always called."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.used, self.other = nn.Linear(8, 8), nn.Linear(8, 8)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, hidden_states: torch.Tensor, beside: torch.Tensor | None = None) -> torch.Tensor:
        hidden: torch.Tensor = self.used(hidden_states)
        other = self.other
        if self.way == "both":
            return other(hidden)
        if self.way == "product":
            return hidden @ other.weight
        if self.way == "functional":
            return nn.functional.linear(other(hidden), self.used.weight)
        if self.way == "dtype":
            return other(hidden.to(other.weight.dtype))
        if self.way == "experts":
            return other(hidden) + self.experts[0](hidden)
        if self.way == "flat":
            return other(hidden.flatten(0, 1)).view(hidden.shape)
        if self.way == "values":
            return other(hidden) if float(hidden.sum()) > 0 else hidden
        return hidden if beside is None else other(beside)


class Toy(hf.PreTrainedModel):
    config_class = hf.PretrainedConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(16, 8)
        self.layers = nn.ModuleList(Block(config.way) for _ in range(2))
        self.post_init()

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
        hidden: torch.Tensor = self.embed(input_ids)
        for block in self.layers:
            hidden = block(hidden)
        return hidden


def use_of(way: str, device: str) -> LinearUse:
    config = hf.PretrainedConfig()
    config.way, config.vocab_size = way, 16
    with torch.device(device):
        model = Toy(config)
    before = {name: (id(one), one.device) for name, one in model.named_parameters()}
    found = linear_use(model, find_blocks(model))
    assert {name: (id(one), one.device) for name, one in model.named_parameters()} == before
    return found


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("way", "uncalled", "read"),
    [
        ("both", [], []),
        ("beside", ["other"], []),
        ("product", ["other"], ["other"]),
        ("functional", [], ["used"]),
        ("dtype", [], ["other"]),
        ("experts", [], []),
        ("values", [], []),
    ],
)
def test_the_use_of_linears_is_seen_without_values(way: str, device: str, uncalled: list, read: list) -> None:
    found = use_of(way, device)
    assert found.uncalled == {f"layers.{index}.{name}" for index in range(2) for name in uncalled}
    assert found.read == {f"layers.{index}.{name}" for index in range(2) for name in read}


def test_inputs_without_rows_are_seen() -> None:
    assert use_of("both", "meta").flat == frozenset()
    assert use_of("flat", "meta").flat == {"layers.0.other", "layers.1.other"}
