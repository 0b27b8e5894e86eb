"""A quantized output matrix: engines compute with it, and what has no place for one is refused before any work."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import calibrant as cb
from calibrant.errors import CalibrantError
from calibrant.modeling.checkpoint import ModelFolder
from tests.conftest import random_set

from ..pipeline.test_prove import SHORT, VLLM
from ..pipeline.test_write_gguf import write


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("head") / "model", "qwen3")


def recipe(head: dict[str, Any], weights: dict[str, Any] | None = None, **keys: Any) -> cb.Recipe:
    scheme = {"weights": weights or {"bits": 4, "group_size": "auto"}, "lm_head": head}
    return cb.Recipe.model_validate(
        {"name": "r", "description": "d", "method": {"name": "rtn"}, "scheme": scheme} | keys
    )


@pytest.mark.parametrize("head", [{}, {"bits": 4, "group_size": "auto"}])
def test_transformers_computes_with_the_packed_matrix(model: Path, tmp_path: Path, head: dict[str, Any]) -> None:
    output = tmp_path / "out"
    report = cb.compress(model, recipe=recipe(head), output=output, dtype="float32")
    assert report.layers[-1].name == "lm_head"
    assert 0 < report.layers[-1].relative_error < (0.02 if head else 1e-4)
    stored, before = load_file(output / "model.safetensors"), load_file(model / "model.safetensors")
    rows, columns = before["lm_head.weight"].shape
    assert stored["lm_head.weight_packed"].numel() * 32 == rows * columns * head.get("bits", 8)
    assert "lm_head.weight" not in stored
    decoded = ModelFolder(output, dequantize=True).read("lm_head.weight")
    difference = (decoded - before["lm_head.weight"]).square().sum() / before["lm_head.weight"].square().sum()
    assert float(difference) == pytest.approx(report.layers[-1].relative_error, rel=1e-3)
    assert cb.prove(output, **SHORT).difference < 1e-4
    settings = json.loads((output / "config.json").read_text())["quantization_config"]
    assert "lm_head" not in settings["ignore"]
    assert settings["config_groups"]["group_1"]["targets"] == ["lm_head"]
    assert cb.RunRecord.read(output).share == 1.0


def test_vllm_computes_with_the_packed_matrix(model: Path, tmp_path: Path) -> None:
    """Of four bits: its kernels for processors know no eight."""
    if not VLLM.is_file():
        pytest.skip("vLLM's environment is not there: make vllm")
    if not torch.cpu.get_capabilities().get("avx512_f"):
        pytest.skip("vLLM's kernels for packed integers need AVX-512")
    output = tmp_path / "out"
    cb.compress(model, recipe=recipe({"bits": 4, "group_size": 64}), output=output)
    assert cb.prove(output, engine="vllm", python=VLLM, dtype="bfloat16", **SHORT).agrees


def test_a_budget_and_a_head_go_together(model: Path, tmp_path: Path) -> None:
    chosen = recipe({"bits": 8}, {"bits": 4, "group_size": 32}, budget={"choices": [2, 4, 8], "average": 4})
    cb.compress(model, recipe=chosen, output=tmp_path / "out", calibration=random_set(model, 4, 32))
    assert cb.prove(tmp_path / "out", **SHORT).difference < 1e-4


@pytest.mark.parametrize(
    ("head", "keys", "settings", "sentence"),
    [
        ({"group_size": 48}, {}, {}, "group size 48 does not divide its 64 inputs"),
        ({}, {"ignore": ["lm_head"]}, {}, "in the recipe's ignore list and in scheme.lm_head"),
        ({}, {}, {"checkpoint_format": "gptq"}, "the gptq format has no place for a quantized lm_head"),
        ({}, {}, {"checkpoint_format": "gguf"}, "the gguf format has no place for a quantized lm_head"),
        ({}, {"method": {"name": "hqq"}}, {}, "hqq has no place for a quantized lm_head"),
    ],
)
def test_what_has_no_place_for_it_is_refused(
    model: Path, tmp_path: Path, head: dict[str, Any], keys: dict[str, Any], settings: dict[str, Any], sentence: str
) -> None:
    weights = {"bits": 4, "group_size": 32, "symmetric": "method" not in keys}
    with pytest.raises(CalibrantError, match=sentence):
        cb.compress(model, recipe=recipe(head, weights, **keys), output=tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_tied_matrices_are_refused_with_the_way_out(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", "llama")
    with pytest.raises(CalibrantError, match=r"lm_head is the embedding too \(tied\).*GGUF"):
        cb.compress(folder, recipe=recipe({}), output=tmp_path / "out")


def test_rounded_activations_are_refused() -> None:
    scheme = {"weights": {"bits": 8}, "activations": {}, "lm_head": {}}
    with pytest.raises(ValueError, match="without quantized activations"):
        cb.Recipe.model_validate({"name": "r", "description": "d", "method": {"name": "rtn"}, "scheme": scheme})
