"""The README's picture is drawn from the committed study."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_the_picture_is_that_of_the_study(tmp_path: Path) -> None:
    pytest.importorskip("altair", reason="the extra report draws it")
    drawn = tmp_path / "impact.svg"
    command = [sys.executable, ROOT / "studies/picture.py", ROOT / "studies/impact", drawn]
    subprocess.run(command, check=True, cwd=tmp_path)
    assert drawn.read_bytes() == (ROOT / "docs/images/impact.svg").read_bytes()
