import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from calibrant.formats.safetensors_file import save_tensors


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002, 0o077, 0o000])
def test_a_file_has_the_permissions_that_the_umask_gives(tmp_path: Path, umask: int) -> None:
    path = tmp_path / "a.safetensors"
    path.touch(0o600)
    before = os.umask(umask)
    try:
        save_tensors({"t": torch.arange(6).view(2, 3).T}, path, {"key": "value"})
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"key": "value"}
        assert file.get_tensor("t").tolist() == [[0, 3], [1, 4], [2, 5]]


def test_nothing_else_is_left_beside_a_file(tmp_path: Path) -> None:
    save_tensors({"t": torch.zeros(2)}, tmp_path / "a.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
