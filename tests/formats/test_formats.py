import json
import struct
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from calibrant.formats.packing import pack, unpack
from calibrant.formats.quantized import Codes, Layout
from calibrant.formats.registry import format_for
from calibrant.formats.shards import ShardWriter


def hexadecimal(words: torch.Tensor) -> list[str]:
    return [f"0x{word & 0xFFFFFFFF:08x}" for word in words.flatten().tolist()]


def test_known_words() -> None:
    assert hexadecimal(pack(torch.arange(-8, 8, dtype=torch.int8)[None], 4)) == ["0x76543210", "0xfedcba98"]
    assert hexadecimal(pack(torch.zeros(1, 8, dtype=torch.int8), 4)) == ["0x88888888"]
    assert hexadecimal(pack(torch.tensor([[-128, -1, 0, 127]], dtype=torch.int8), 8)) == ["0xff807f00"]
    assert hexadecimal(pack(torch.tensor([[-2, -1, 0, 1] * 4], dtype=torch.int8), 2)) == ["0xe4e4e4e4"]


@settings(max_examples=50, deadline=None)
@given(st.sampled_from([2, 4, 8]), st.integers(1, 9), st.integers(1, 40), st.integers(0, 99))
def test_packing_is_what_the_format_library_does(bits: int, rows: int, columns: int, seed: int) -> None:
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    words = pack(codes, bits)
    assert torch.equal(words, pack_to_int32(codes, bits))
    assert torch.equal(unpack(words, bits, columns), codes)
    assert torch.equal(unpack_from_int32(words, bits, codes.shape), codes)


@pytest.mark.parametrize("layout", [
    Layout(4, True, 16, None), Layout(4, False, 16, None), Layout(2, False, None, None), Layout(3, True, 16, None),
    Layout(8, True, None, "dynamic"), Layout(6, False, 8, None),
])  # fmt: skip
@pytest.mark.parametrize("rows", [5, 8])
def test_what_is_read_is_what_was_written(layout: Layout, rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    half = 1 << (layout.bits - 1)
    groups = 32 // (layout.group_size or 32)
    codes = torch.randint(-half, half, (rows, 32), generator=generator).to(torch.int8)
    zero_point = torch.zeros(rows, groups, dtype=torch.int8)
    if not layout.symmetric:
        zero_point = torch.randint(-half, half, (rows, groups), generator=generator).to(torch.int8)
    written = Codes(codes, torch.rand(rows, groups, generator=generator).bfloat16(), zero_point)
    read = format_for(layout).read(format_for(layout).write(written, layout), layout)
    for name in ("codes", "scale", "zero_point"):
        assert torch.equal(vars(read)[name], vars(written)[name])


def parts() -> list[dict[str, torch.Tensor]]:
    return [
        {"b": torch.arange(6, dtype=torch.float32).view(2, 3), "a": torch.tensor([1, 2, 3], dtype=torch.int8)},
        {"c": torch.ones(4, dtype=torch.bfloat16), "d": torch.tensor(7, dtype=torch.int64)},
    ]


@pytest.mark.parametrize(("limit", "files"), [(1 << 30, 1), (40, 2)])
def test_parts_become_files_with_the_same_tensors(tmp_path: Path, limit: int, files: int) -> None:
    """One file, or parts of more than ``limit`` bytes as shards with an index."""
    writer = ShardWriter(tmp_path / "parts", {"format": "pt"}, limit)
    for part in parts():
        writer.write_part(part)
    written = writer.finish(tmp_path / "out")
    assert len(written) == files
    loaded = {name: tensor for file in written for name, tensor in load_file(file).items()}
    for name, tensor in {**parts()[0], **parts()[1]}.items():
        assert torch.equal(loaded[name], tensor)
    if files > 1:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == {name: written[name in "cd"].name for name in "abcd"}
        assert [file.stat().st_nlink for file in written] == [2, 2]  # written once


def test_a_writer_goes_on_after_the_parts_that_count(tmp_path: Path) -> None:
    first = ShardWriter(tmp_path / "parts", {"format": "pt"})
    for part in [*parts(), {"lost": torch.ones(3)}]:
        first.write_part(part)
    second = ShardWriter(tmp_path / "parts", {"format": "pt"})
    second.resume(2)
    assert len(list((tmp_path / "parts").iterdir())) == 2
    second.write_part({"new": torch.ones(5)})
    (file,) = second.finish(tmp_path / "out")
    assert set(load_file(file)) == {"a", "b", "c", "d", "new"}


def test_tensors_are_aligned_and_the_metadata_is_there(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "parts", {"format": "pt", "note": "x"})
    for part in parts():
        writer.write_part(part)
    raw = writer.finish(tmp_path / "out")[0].read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    assert header["__metadata__"] == {"format": "pt", "note": "x"}
    assert (8 + length) % 8 == 0
    assert header["d"]["data_offsets"][0] % 8 == 0
