"""GPTQ and AWQ checkpoints: the packed words that other readers expect, and round trips of complete models."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_tensors.entrypoints.convert import AutoAWQConverter
from safetensors.torch import load_file, save_file

import calibrant as cb
from calibrant.errors import CalibrantError
from calibrant.formats.compressed_tensors import PackQuantized
from calibrant.formats.gptq import Gptq
from calibrant.formats.quantized import Codes, Layout
from calibrant.formats.registry import format_for
from calibrant.formats.stored_codes import dense_weights
from calibrant.modeling.checkpoint import ModelFolder
from calibrant.modeling.whole_model import load_whole
from calibrant.recipes.recipe import Recipe
from tests.conftest import random_set, write_model


def hexadecimal(words: torch.Tensor) -> set[str]:
    return {f"0x{word & 0xFFFFFFFF:08x}" for word in words.flatten().tolist()}


def random_codes(bits: int, symmetric: bool, rows: int = 16, columns: int = 32, group: int = 8) -> Codes:
    generator = torch.Generator().manual_seed(bits)
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (rows, columns), generator=generator).to(torch.int8)
    zero_point = torch.zeros(rows, columns // group, dtype=torch.int8)
    if not symmetric:
        zero_point = torch.randint(-half, half, zero_point.shape, generator=generator).to(torch.int8)
    return Codes(codes, torch.rand(zero_point.shape, generator=generator).half() + 0.1, zero_point)


def test_awq_words_are_the_documented_ones() -> None:
    """A word whose columns contain their index, and the zero points of a symmetric model."""
    codes = (torch.arange(8, dtype=torch.int8) - 8)[:, None].expand(8, 8).contiguous()
    written = format_for(Layout(4, True, 8, None, "awq")).write(
        Codes(codes, torch.ones(8, 1).half(), torch.zeros(8, 1, dtype=torch.int8)), Layout(4, True, 8, None, "awq")
    )
    assert hexadecimal(written["qweight"]) == {"0x75316420"}
    assert hexadecimal(written["qzeros"]) == {"0x88888888"}
    assert written["qweight"].shape == (8, 1)


def test_gptq_stores_zero_points_minus_one() -> None:
    layout = Layout(4, True, 8, None, "gptq")
    written = format_for(layout).write(random_codes(4, True), layout)
    assert hexadecimal(written["qzeros"]) == {"0x77777777"}
    assert written["qweight"].shape == (4, 16)
    assert written["scales"].shape == (4, 16)
    assert written["g_idx"].tolist() == [i // 8 for i in range(32)]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptq_is_unpacked_as_its_reference_does(bits: int) -> None:
    """The reference in numpy: weights packed along the inputs, zero points minus one along the outputs."""
    layout = Layout(bits, True, 8, None, "gptq")
    codes = random_codes(bits, True)
    written = {name: tensor.numpy() for name, tensor in format_for(layout).write(codes, layout).items()}
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    mask = (1 << bits) - 1
    weight = (written["qweight"].view(np.uint32)[:, None, :] >> shifts[None, :, None]) & mask
    zeros = ((written["qzeros"].view(np.uint32)[:, :, None] >> shifts) & mask).reshape(4, 16) + 1
    expanded = weight.reshape(32, 16).astype(np.int64)
    dense = written["scales"][written["g_idx"]] * (expanded - zeros[written["g_idx"]].astype(np.int64))
    expected = (codes.codes.view(16, 4, 8).float() * codes.scale.float()[..., None]).view(16, 32)
    np.testing.assert_allclose(dense.T.astype(np.float32), expected.numpy(), rtol=1e-3)


def test_the_format_librarys_converter_reads_our_awq() -> None:
    codes, layout = random_codes(4, False), Layout(4, False, 8, None, "awq")
    tensors = {f"layer.{suffix}": value for suffix, value in format_for(layout).write(codes, layout).items()}
    converted = AutoAWQConverter(group_size=8).process(tensors)
    read = PackQuantized().read(
        {name.removeprefix("layer."): value for name, value in converted.items()}, Layout(4, False, 8, None)
    )
    for name in ("codes", "zero_point", "scale"):
        assert torch.equal(vars(read)[name], vars(codes)[name])


def recipe(bits: int, symmetric: bool, **fields: object) -> Recipe:
    weights = {"bits": bits, "symmetric": symmetric, "group_size": 32}
    method = {"name": "gptq"}
    return Recipe.model_validate(
        {"name": "r", "description": "d", "method": method, "scheme": {"weights": weights}, **fields}
    )


@pytest.mark.parametrize(("checkpoint_format", "bits", "symmetric"), [
    ("gptq", 4, True), ("gptq", 8, True), ("gptq", 3, True), ("awq", 4, True), ("awq", 4, False),
])  # fmt: skip
def test_a_whole_model_is_the_same_in_every_format(
    tmp_path: Path, checkpoint_format, bits: int, symmetric: bool
) -> None:
    """Scales of a float16 model have the same dtype in all formats, so weights and logits must be equal."""
    model = write_model(tmp_path / "model", "llama", torch.float16)
    chosen, made = recipe(bits, symmetric, ignore=["layers.1.mlp.up_proj"]), random_set(model)
    for name in ("compressed-tensors", checkpoint_format):
        cb.compress(model, output=tmp_path / name, recipe=chosen, calibration=made, checkpoint_format=name)
    tokens = random_set(seed=9).tokens.long()
    logits = []
    for name in ("compressed-tensors", checkpoint_format):
        loaded = load_whole(ModelFolder(tmp_path / name, allow_quantized=True), "cpu", "float32")
        with torch.no_grad():
            logits.append(loaded(tokens).logits)
    assert torch.equal(*logits)
    config = json.loads((tmp_path / checkpoint_format / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == checkpoint_format
    if checkpoint_format == "gptq":
        assert config == json.loads((tmp_path / "gptq" / "quantize_config.json").read_text())
        assert (config["sym"], config["desc_act"]) == (True, False)
        (left_alone,) = config["dynamic"]
        assert left_alone.startswith("-:")
        assert re.fullmatch(left_alone[2:], "model.layers.1.mlp.up_proj")
        assert not re.fullmatch(left_alone[2:], "model.layers.1_mlp_up_proj")
    else:
        assert "model.layers.1.mlp.up_proj" in config["modules_to_not_convert"]
    result = cb.evaluate(tmp_path / checkpoint_format, against=model, length=32, limit=2)
    assert result.divergence is not None


def test_gptq_of_version_two_is_read(tmp_path: Path) -> None:
    """Version 2 stores zero points as they are."""
    codes, layout = random_codes(4, True), Layout(4, True, 8, None, "gptq")
    tensors = {f"layer.{name}": value for name, value in format_for(layout).write(codes, layout).items()}
    one = dense_weights(tensors, tensors.__getitem__, {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq"})
    tensors["layer.qzeros"] = tensors["layer.qzeros"] + 0x11111111
    settings = {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"}
    two = dense_weights(tensors, tensors.__getitem__, settings)
    assert torch.equal(one["layer.weight"], two["layer.weight"])
    tensors["layer.g_idx"] = tensors["layer.g_idx"].flip(0)
    with pytest.raises(CalibrantError, match="out of order"):
        dense_weights(tensors, tensors.__getitem__, settings)


def test_gptq_of_three_bits_is_read() -> None:
    """Three words contain 32 values: ten, one across the border, ten, one across the border, ten."""
    generator = torch.Generator().manual_seed(3)

    def packed(values: list[int]) -> list[int]:
        words = [0, 0, 0]
        for number in range(10):
            words[0] |= values[number] << 3 * number
            words[1] |= values[11 + number] << 3 * number + 1
            words[2] |= values[22 + number] << 3 * number + 2
        words[0] |= (values[10] & 3) << 30
        words[1] |= values[10] >> 2 | (values[21] & 1) << 31
        words[2] |= values[21] >> 1
        return words

    codes = torch.randint(0, 8, (64, 32), generator=generator)  # [inputs, outputs]
    zeros = torch.randint(0, 8, (2, 32), generator=generator)
    scales = torch.rand(2, 32, generator=generator).half() + 0.1
    columns = [packed(run.tolist()) for half in codes.view(2, 32, 32) for run in half.T]
    qweight = torch.tensor(columns, dtype=torch.int64).view(2, 32, 3).permute(0, 2, 1).reshape(6, 32)
    qzeros = torch.tensor([packed(row.tolist()) for row in zeros], dtype=torch.int64)
    tensors = {"layer.qweight": qweight.to(torch.int32), "layer.qzeros": qzeros.to(torch.int32), "layer.scales": scales}
    read = dense_weights(tensors, tensors.__getitem__, {"quant_method": "gptq", "bits": 3})["layer.weight"]
    group = torch.arange(64) // 32
    expected = (codes - zeros[group] - 1).half() * scales[group]
    assert torch.equal(read, expected.T)
    written = Gptq().write(
        Codes((codes.T - 4).to(torch.int8), scales.T.contiguous(), (zeros.T - 3).to(torch.int8)),
        Layout(3, True, 32, format="gptq"),
    )
    assert torch.equal(written["qweight"], tensors["layer.qweight"])
    assert torch.equal(written["qzeros"], tensors["layer.qzeros"])


def test_three_bits_make_smaller_files_in_the_gptq_format(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "llama", torch.float16)
    made = random_set(model)
    cb.compress(model, output=tmp_path / "out", recipe=recipe(3, True), calibration=made, checkpoint_format="gptq")
    linear = "model.layers.0.mlp.up_proj"
    stored = load_file(tmp_path / "out" / "model.safetensors")
    rows, columns = ModelFolder(model).tensors[f"{linear}.weight"].shape
    assert stored[f"{linear}.qweight"].nbytes == rows * columns * 3 // 8
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["bits"] == 3
    assert cb.evaluate(tmp_path / "out", against=model, length=32, limit=2).divergence is not None


def stored(kind: str) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """A linear in the format ``kind``, and its settings in ``config.json``."""
    codes, layout = random_codes(4, True), Layout(4, True, 8, None, kind)
    tensors = {f"layer.{name}": value for name, value in format_for(layout).write(codes, layout).items()}
    return tensors, {"quant_method": kind, "bits": 4}


@pytest.mark.parametrize("kind", ["gptq", "awq"])
@pytest.mark.parametrize("part", ["qzeros", "scales"])
def test_a_missing_or_cut_tensor_is_named(kind: str, part: str) -> None:
    tensors, settings = stored(kind)
    cut = {**tensors, f"layer.{part}": tensors[f"layer.{part}"][:, :-1]}
    with pytest.raises(CalibrantError, match=r"layer: the shapes of its tensors do not fit 4 bits"):
        dense_weights(cut, cut.__getitem__, settings)
    del tensors[f"layer.{part}"]
    with pytest.raises(CalibrantError, match=rf"layer: its files lack layer\.{part}; copy or download"):
        dense_weights(tensors, tensors.__getitem__, settings)


@pytest.mark.parametrize(("kind", "wrong"), [
    ("gptq", {"checkpoint_format": "marlin"}), ("gptq", {"bits": 5}),
    ("awq", {"version": "gemv"}), ("awq", {"bits": 3}),
])  # fmt: skip
def test_other_layouts_of_the_same_name_are_not_read(kind: str, wrong: dict[str, object]) -> None:
    tensors, settings = stored(kind)
    with pytest.raises(CalibrantError, match="is not read"):
        dense_weights(tensors, tensors.__getitem__, {**settings, **wrong})


def test_wrong_bits_do_not_read_as_another_order() -> None:
    tensors, settings = stored("gptq")
    with pytest.raises(CalibrantError, match="do not fit 8 bits"):
        dense_weights(tensors, tensors.__getitem__, {**settings, "bits": 8})


@pytest.mark.parametrize("checkpoint_format", ["gptq", "awq"])
@pytest.mark.parametrize(
    ("factor", "said"), [(1e-8, "too small for scales in float16"), (1e10, "too large for scales")]
)
def test_weights_that_float16_scales_cannot_hold_are_refused(
    tmp_path: Path, checkpoint_format, factor: float, said: str
) -> None:
    model = write_model(tmp_path / "model", "llama")
    file = model / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.self_attn.v_proj"
    tensors[f"{name}.weight"] *= factor
    save_file(tensors, file, {"format": "pt"})
    options = {"recipe": "rtn-w8a16", "checkpoint_format": checkpoint_format}
    if checkpoint_format == "awq":
        options["recipe"] = recipe(4, True, method={"name": "rtn"})
    with pytest.raises(CalibrantError, match=f"{name}: its weights are {said}"):
        cb.compress(model, output=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    cb.compress(model, output=tmp_path / "out", recipe=options["recipe"])  # float32 scales can represent them


@pytest.mark.parametrize(("checkpoint_format", "chosen", "said"), [
    ("gptq", recipe(4, False), "take symmetric weights"),
    ("awq", recipe(3, True), "4-bit weights, not 3"),
    ("awq", "rtn-w8a8", "for weights alone"),
    ("gptq", "wanda-2:4", "stored dense"),
    ("gptq", "hqq-w4a16", "hqq stores its values dense, so no gptq checkpoint is written"),
    ("exl2", "gptq-w4a16", "no such format"),
])  # fmt: skip
def test_what_a_format_cannot_hold(llama: Path, tmp_path: Path, checkpoint_format, chosen, said: str) -> None:
    with pytest.raises(CalibrantError, match=said):
        cb.compress(
            llama,
            output=tmp_path / "out",
            recipe=chosen,
            calibration=random_set(llama),
            checkpoint_format=checkpoint_format,
        )
    assert not (tmp_path / "out").exists()
