"""Proof in an engine: real engines agree with what is stored, and what they read otherwise is found out."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import calibrant as cb
from calibrant.cli.main import app
from tests.conftest import random_set

from ..formats.test_packed_experts import saved
from .test_write_gguf import compressed, write

VLLM = Path(__file__).parents[2] / ".vllm" / "bin" / "python"
SHORT: dict[str, Any] = {"length": 24, "windows": 1, "new_tokens": 12}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("prove") / "model")


def made(model: Path, output: Path, recipe: str) -> Path:
    cb.compress(model, recipe=recipe, output=output, calibration=random_set(model, 8, 32))
    return output


@pytest.mark.parametrize("recipe", ["gptq-w4a16", "rtn-w8a8", "rtn-w8a8-static", "rtn-fp8", "wanda-50", "hqq-w4a16"])
def test_transformers_computes_what_is_stored(model: Path, tmp_path: Path, recipe: str) -> None:
    output = made(model, tmp_path / "out", recipe)
    proof = cb.prove(output, **SHORT)
    assert proof.agrees
    assert (proof.engine, proof.tokens, proof.new_tokens) == ("transformers", 23, 12)
    assert proof.difference < 0.01
    assert proof.same_tokens == 12 or proof.margin < 0.01
    assert cb.RunRecord.read(output).proofs == [proof]
    assert "| transformers " in (output / "README.md").read_text()
    cb.prove(output, **{**SHORT, "new_tokens": 4})  # takes the place of the first
    assert [one.new_tokens for one in cb.RunRecord.read(output).proofs] == [4]


def test_asymmetric_weights_are_loaded_as_the_note_says(model: Path, tmp_path: Path) -> None:
    recipe = cb.builtin_recipes()["gptq-w4a16-g128-asym"].with_weights(None, 32)
    cb.compress(model, recipe=recipe, output=tmp_path / "out", calibration=random_set(model, 8, 32))
    assert cb.prove(tmp_path / "out", **SHORT).difference < 1e-3


def test_an_engine_that_reads_something_else_is_found_out(tmp_path: Path) -> None:
    """transformers 5.23 drops the scale of a tensor of NVFP4 experts, and says nothing."""
    model = saved(tmp_path / "model", "qwen3_moe")
    output = made(model, tmp_path / "out", "gptq-nvfp4a16")
    with pytest.raises(cb.CalibrantError, match="does not compute what is stored, do not serve it there"):
        cb.prove(output, dtype="bfloat16", **SHORT)
    (proof,) = cb.RunRecord.read(output).proofs
    assert not proof.agrees
    assert proof.difference > 3 * proof.allowed
    assert "| **no** |" in (output / "README.md").read_text()


def test_llama_cpp_computes_what_is_stored_and_not_what_another_file_has(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="xllamacpp, which runs llama.cpp, is not installed")
    output = compressed(model, tmp_path / "out")
    proof = cb.prove(output, engine="llama.cpp", against=model, **SHORT)
    assert proof.agrees
    assert proof.kl is not None
    exact = cb.evaluate(output, against=model, length=24, limit=1).divergence
    assert exact is not None
    assert 0.5 * exact.kl_mean < proof.kl < 1.5 * exact.kl_mean
    other = compressed(model, tmp_path / "other", bits=2)
    cb.write_gguf(other, output=tmp_path / "other.gguf")
    with pytest.raises(cb.CalibrantError, match="does not compute what is stored"):
        cb.prove(output, engine="llama.cpp", gguf=tmp_path / "other.gguf", **SHORT)


@pytest.mark.parametrize("recipe", ["gptq-w8a8", "rtn-fp8"])
def test_vllm_computes_what_is_stored(tmp_path: Path, recipe: str) -> None:
    if not VLLM.is_file():
        pytest.skip("vLLM's environment is not there: make vllm")
    model = write(tmp_path / "model", "qwen3")  # heads of 32, the least that vLLM has
    proof = cb.prove(made(model, tmp_path / "out", recipe), engine="vllm", python=VLLM, **SHORT)
    assert proof.agrees


def test_the_command_prints_what_was_seen(model: Path, tmp_path: Path) -> None:
    output = made(model, tmp_path / "out", "gptq-w4a16")
    options = ["--length", "24", "--windows", "1", "--new-tokens", "6"]
    ran = CliRunner().invoke(app, ["prove", str(output), *options])
    assert ran.exit_code == 0
    assert "computes what is stored in" in ran.stdout
    assert "6 of 6 tokens the same" in ran.stdout
    found = json.loads(CliRunner().invoke(app, ["prove", str(output), *options, "--json"]).stdout)
    assert found["agrees"] is True


@pytest.mark.parametrize(("options", "said"), [
    ({"engine": "vllm", "python": sys.executable}, "has no package vllm, which runs vllm; install it there"),
    ({"python": "/no/such/python"}, "is no Python that runs"),
    ({"engine": "exllama"}, "exllama: no such engine; there are transformers, vllm, llama.cpp"),
    ({"windows": 0}, "need at least 1 of each"),
    ({"gguf": "x.gguf"}, "only llama.cpp loads GGUF files, not transformers"),
    ({"dtype": "int4"}, "int4: no such dtype"),
])  # fmt: skip
def test_what_cannot_be_asked_is_refused(model: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(cb.CalibrantError, match=said):
        cb.prove(model, **{**SHORT, **options})


def test_an_engine_that_fails_is_quoted(model: Path, tmp_path: Path) -> None:
    """transformers has no GPTQ without a package more."""
    output = compressed(model, tmp_path / "out")
    with pytest.raises(cb.CalibrantError, match=r"transformers fails on it .*requires optimum"):
        cb.prove(output, **SHORT)
