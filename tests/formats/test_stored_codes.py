"""Checkpoints that say or hold something else than what is read: refused in a sentence, never decoded wrongly."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from calibrant.errors import CalibrantError
from calibrant.formats.stored_codes import dense_weights, dequantized, settings_of, stored_codes, stored_layout

INT4: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32},
        }
    },
}
PACKED = {
    "a.q.weight_packed": torch.zeros(8, 8, dtype=torch.int32),
    "a.q.weight_scale": torch.ones(8, 2),
    "a.q.weight_shape": torch.tensor([8, 64]),
}
FP8: dict[str, Any] = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def read(tensors: dict[str, torch.Tensor], settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    return dense_weights(tensors, tensors.__getitem__, settings)


def without(part: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in PACKED.items() if not name.endswith(part)}


def weights(**changes: Any) -> dict[str, Any]:
    changed = copy.deepcopy(INT4)
    group = changed["config_groups"]["group_0"]
    group["weights"] = {**group["weights"], **changes}
    return changed


def test_the_whole_is_read() -> None:
    assert read(PACKED, INT4)["a.q.weight"].shape == (8, 64)


@pytest.mark.parametrize(
    "tensors",
    [
        without("weight_scale"),
        without("weight_shape"),
        {**PACKED, "a.q.weight_scale": torch.ones(8, 3)},
        {**PACKED, "a.q.weight_scale": torch.ones(4, 2)},
        {**PACKED, "a.q.weight_g_idx": torch.arange(64)},
        {**PACKED, "a.q.weight_shape": torch.tensor([8])},
    ],
)
def test_tensors_that_are_missing_or_do_not_fit_are_refused(tensors: dict[str, torch.Tensor]) -> None:
    with pytest.raises(CalibrantError, match=r"a\.q"):
        read(tensors, INT4)


@pytest.mark.parametrize(
    "settings",
    [
        {**INT4, "config_groups": {}},
        {**INT4, "config_groups": []},
        {**INT4, "config_groups": {"g": {"targets": ["Linear"], "weights": None}}},
        {key: value for key, value in INT4.items() if key != "config_groups"},
        weights(num_bits="four"),
        weights(num_bits=3),
        weights(num_bits=16),
        weights(strategy="tensor"),
        weights(strategy=None),
        weights(symmetric="yes"),
        weights(group_size="wide"),
    ],
)
def test_settings_that_say_something_else_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(CalibrantError, match=r"config\.json"):
        read(PACKED, settings)


@pytest.mark.parametrize("block", [None, [64, 64], [128], "128"])
def test_blocks_of_other_sizes_are_refused(block: Any) -> None:
    tensors = {"a.q.weight": torch.ones(128, 128).to(torch.float8_e4m3fn), "a.q.weight_scale_inv": torch.ones(2, 2)}
    with pytest.raises(CalibrantError, match="128"):
        read(tensors, {**FP8, "weight_block_size": block})
    with pytest.raises(CalibrantError, match=r"scales of shape \(2, 2\)"):
        read(tensors, FP8)


def test_one_row_in_several_blocks_is_decoded_by_blocks() -> None:
    codes = {"a.q.weight": torch.ones(1, 130).to(torch.float8_e4m3fn), "a.q.weight_scale_inv": torch.tensor([[1, 2.0]])}
    expected = torch.cat([torch.ones(128), torch.full((2,), 2.0)])
    assert torch.equal(read(codes, FP8)["a.q.weight"][0], expected)


def test_groups_are_found_by_name_by_expression_and_by_class() -> None:
    named = {"targets": ["model.language_model.layers.0.q", "model.language_model.layers.10.q"]}
    other = {"targets": ["model.language_model.layers.0.up", "lm_head"]}
    matched, linears = {"targets": [r"re:.*\.down$"]}, {"targets": ["Linear"]}

    def found(name: str, *groups: dict[str, list[str]]) -> Any:
        return settings_of(name, {"config_groups": dict(enumerate(groups))})

    # Names of stored tensors may begin otherwise.
    assert found("language_model.model.layers.0.up", named, other) is other
    assert found("language_model.lm_head", named, other) is other
    for groups in itertools.permutations((named, other, matched, linears)):
        assert found("model.language_model.layers.10.q", *groups) is named
        assert found("model.language_model.layers.1.q", *groups) is linears
        assert found("layers.0.down", *groups) is matched
        assert found("lm_head", *groups) is other
    with pytest.raises(CalibrantError, match=r"none of its 2 config_groups is for layers\.3\.q"):
        found("layers.3.q", named, matched)


def test_expressions_that_never_end_are_refused() -> None:
    settings = {"config_groups": {"a": {"targets": ["re:(a+)+$"]}, "b": {"targets": ["re:("]}}}
    with pytest.raises(CalibrantError, match=r"cannot be matched"):
        settings_of("a" * 40 + "b", settings)
    with pytest.raises(CalibrantError, match=r"cannot be matched"):
        settings_of("q", settings)


def test_codes_and_layout_give_the_weight() -> None:
    make: Callable[[str], torch.Tensor] = PACKED.__getitem__
    codes = stored_codes("a.q", PACKED, make, INT4)
    assert torch.equal(dequantized(codes, stored_layout("a.q", INT4)), read(PACKED, INT4)["a.q.weight"])
