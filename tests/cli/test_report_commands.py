"""``calibrant report`` and ``calibrant compare``."""

import json
from pathlib import Path

import pytest

import calibrant as cb
from tests.cli.damage import refused
from tests.conftest import random_set


@pytest.fixture(scope="module")
def out(model_folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out") / "pruned"
    source = model_folder("llama")
    cb.compress(source, output=folder, recipe="wanda-2:4", calibration=random_set(source), dtype="float32")
    return folder


def test_report_writes_the_page_and_says_where(run, out: Path, llama: Path, tmp_path: Path) -> None:
    status, shown, _ = run("report", out, "-o", tmp_path / "page.html", "--against", llama, "--prompt", "ab", "--json")
    assert status == 0
    assert json.loads(shown) == {"report": str(tmp_path / "page.html")}
    assert "Samples before and after" in (tmp_path / "page.html").read_text(encoding="utf-8")
    status, stdout, err = run("report", llama)
    refused(status, stdout, err, "no compressed model of Calibrant", tmp_path)
    status, stdout, err = run("report", out, "--prompt", "ab", "-o", tmp_path / "page.html")
    assert status == 2
    assert "--prompt are continued by both models: name the original with --against" in err


def test_compare_prints_one_table_and_writes_a_page(run, out: Path, llama: Path, tmp_path: Path) -> None:
    assert run("evaluate", out, "--against", llama, "--length", 32, "--limit", 2, "--save", "--quiet")[0] == 0
    status, shown, _ = run("compare", out, "-o", tmp_path / "page.html")
    assert status == 0
    said = " ".join(shown.split())
    for expected in ("wanda-2:4", "8 x 32", "error of mlp.up_proj", "KL, text: 2 x 32 tokens", "page: "):
        assert expected in said
    status, shown, _ = run("compare", out, "--against", llama, "--length", 16, "--limit", 1, "--json")
    assert status == 0
    found = json.loads(shown)["models"]["pruned"]
    assert found["evaluation"]["windows"] == 1
    assert found["fallbacks"] == {}
    status, stdout, err = run("compare", out, tmp_path)
    refused(status, stdout, err, f"{tmp_path}: no compressed model of Calibrant", tmp_path)
