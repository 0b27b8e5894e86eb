"""Tensors of a suspended pass are in a file alone, and come back as they were."""

from pathlib import Path

import pytest
import torch
from torch import nn

from calibrant.errors import CalibrantError
from calibrant.modeling.suspended_tensors import SuspendedTensors, tensors_of


class _Cached(nn.Module):
    """A module with a parameter, a buffer and a tensor that is neither."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.register_buffer("mask", torch.ones(64, 64))
        self.cache = {"table": torch.zeros(64, 64)}


def bytes_in_memory(*tensors: torch.Tensor) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool])
def test_what_is_moved_out_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    with torch.inference_mode():
        first, second = (torch.randn(3, 50, 64).to(dtype) for _ in range(2))
        view, copies = first[1:, :, 3], (first.clone(), second.clone())
        file = SuspendedTensors(tmp_path / "file", [])
        file.see(((first, [second]), {"again": first}))
        for _ in range(3):
            file.move_out()
            assert bytes_in_memory(first, second, view) == 0
            assert (tmp_path / "file").stat().st_size == copies[0].nbytes + copies[1].nbytes
            file.move_back()
            assert torch.equal(first, copies[0])
            assert torch.equal(second, copies[1])
            assert torch.equal(view, copies[0][1:, :, 3])
        file.forget()
        assert not (tmp_path / "file").exists()


def test_shared_small_released_and_dead_tensors_stay_where_they_are(tmp_path: Path) -> None:
    module = _Cached()
    shared = [torch.ones(64, 64), module.linear.weight, module.mask, module.cache["table"]]
    small, released, own = torch.ones(10), torch.ones(64, 64), torch.ones(64, 64)
    file = SuspendedTensors(tmp_path / "file", [shared[0], *tensors_of([module])])
    file.see([*shared, small, released, own, torch.ones(64, 64)])
    released.set_()
    file.move_out()
    assert bytes_in_memory(own) == 0
    assert (tmp_path / "file").stat().st_size == own.numel() * 4
    assert all(one.untyped_storage().nbytes() for one in (*shared, small))
    file.move_back()
    assert bool((own == 1).all())


def test_a_lost_or_cut_file_is_said(tmp_path: Path) -> None:
    own = torch.ones(64, 64)
    file = SuspendedTensors(tmp_path / "file", [])
    file.see(own)
    file.move_out()
    (tmp_path / "file").write_bytes(b"short")
    with pytest.raises(CalibrantError, match=r"file: cannot be read .*; run again"):
        file.move_back()
    file = SuspendedTensors(tmp_path / "none" / "file", [])
    file.see(torch.ones(64, 64, requires_grad=True))
    with pytest.raises(CalibrantError, match=r"cannot be written .*; free some disk"):
        file.move_out()
