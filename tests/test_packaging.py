"""What the image and the wheel are built from."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def copied() -> list[str]:
    """What the Dockerfile copies."""
    lines = re.findall(r"^COPY (.+) /source/", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.M)
    return [name for line in lines for name in line.split()]


def test_the_image_may_copy_what_it_copies() -> None:
    allowed = re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(encoding="utf-8"), re.M)
    assert sorted(copied()) == sorted(allowed)


def test_the_image_has_all_that_the_package_is_described_by(tmp_path: Path) -> None:
    """The metadata of the wheel, made from the image's files alone."""
    pytest.importorskip("setuptools", minversion="77", reason="setuptools builds the package")
    for name in copied():
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    build = "from setuptools.build_meta import prepare_metadata_for_build_wheel as make; make('.')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True)
    (metadata,) = tmp_path.glob("*.dist-info/METADATA")
    assert "# Calibrant" in metadata.read_text(encoding="utf-8")
