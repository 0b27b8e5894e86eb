"""Damaged models get one clear sentence and status 2."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.cli.damage import (
    edited_config,
    edited_header,
    escaping_shard,
    header_only,
    missing_shard,
    no_config,
    no_weights,
    refused,
    truncated,
    without,
)


def test_a_file_is_no_model(run, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    status, _, err = run("compress", tmp_path / "model.gguf", "-o", tmp_path / "out")
    assert status == 2
    assert "is a file; a model is a folder" in err


@pytest.mark.parametrize(("damage", "said"), [
    (no_config, "config.json is missing"),
    (no_weights, "only safetensors"),
    (truncated, "not a complete safetensors"),
    (header_only, "not a complete safetensors"),
    (edited_header(shape=["a"]), "not a complete safetensors"),
    (edited_header(dtype=5), "not a complete safetensors"),
    (missing_shard, "shard is missing"),
    (escaping_shard, "leaves the folder"),
    (edited_config(architectures=["BertForSequenceClassification"]), "not a causal language model"),
    (edited_config(model_type="nonsense"), "config.json"),
    (edited_config(quantization_config={"quant_method": "gptq"}), "quantized already"),
    (edited_config(num_hidden_layers=3), "no weights for"),
    (edited_config(intermediate_size=100_000), "stored with shape"),
])  # fmt: skip
def test_damaged_models(run, llama: Path, tmp_path: Path, damage, said: str) -> None:
    model = shutil.copytree(llama, tmp_path / "model")
    damage(model)
    status, out, err = run("compress", model, "-o", tmp_path / "out", "-q", "-n", 2, "-l", 8)
    refused(status, out, err, said, tmp_path)


def test_a_mixture_of_experts_without_its_attention(run, model_folder, tmp_path: Path) -> None:
    model = shutil.copytree(model_folder("mixtral"), tmp_path / "model")
    without("model.layers.1.self_attn.q_proj.weight")(model)
    status, out, err = run("compress", model, "-r", "rtn-w8a8", "-o", tmp_path / "out", "-q")
    refused(status, out, err, "no weights for model.layers.1.self_attn.q_proj.weight", tmp_path)


def test_generate_refuses_what_gives_no_text(run, llama: Path, tmp_path: Path) -> None:
    model = shutil.copytree(llama, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][:] = float("nan")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    status, out, err = run("data", "generate", model, "-o", tmp_path / "out", "-n", 2, "-l", 8, "-q")
    refused(status, out, err, "not finite", tmp_path)
    status, out, err = run("data", "generate", llama, "-o", tmp_path / ("out" + 400 * "x"), "-n", 2, "-l", 8, "-q")
    refused(status, out, err, "File name too long", tmp_path)


def test_missing_weights_are_not_made_up(run, llama: Path, tmp_path: Path) -> None:
    model = shutil.copytree(llama, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    for command in (["evaluate", model, "--length", 32], ["data", "generate", model, "-o", tmp_path / "out"]):
        status, out, err = run(*command, "-q")
        refused(status, out, err, "no weights for model.norm.weight", tmp_path)


@pytest.mark.parametrize("setting", ['"rope_theta": "x"', '"hidden_act": "none"', '"hidden_size": -64'])
def test_configs_that_make_no_model(run, llama: Path, tmp_path: Path, setting: str) -> None:
    model = shutil.copytree(llama, tmp_path / "model")
    text = (model / "config.json").read_text().rstrip().removesuffix("}").rstrip()
    name = setting.partition(":")[0]
    kept = "\n".join(line for line in text.splitlines() if name not in line).rstrip(",")
    (model / "config.json").write_text(kept + ",\n" + setting + "}")
    status, out, err = run("compress", model, "-r", "rtn-w8a8", "-o", tmp_path / "out", "-q")
    refused(status, out, err, "config.json", tmp_path)


@pytest.mark.parametrize(("damage", "options", "said"), [
    (truncated, [], "not a complete safetensors"),
    (no_weights, [], "only safetensors"),
    (edited_config(vocab_size=50), [], "vocabulary"),
    (edited_config(hidden_size="64"), [], "config.json"),
    (edited_config(hidden_size=4096), [], "stored with shape"),
    (edited_config(architectures=5), [], "not a causal language model"),
    (edited_config(), ["--length", 65], "context of 64"),
    (edited_config(), ["--length", 1], "at least 2"),
    (edited_config(), ["--text", "nowhere.txt"], "no such text file"),
])  # fmt: skip
def test_evaluate_refuses_bad_input(run, llama: Path, tmp_path: Path, damage, options: list[str], said: str) -> None:
    model = shutil.copytree(llama, tmp_path / "model")
    damage(model)
    status, out, err = run("evaluate", model, "--length", 32, *options, "-q")
    refused(status, out, err, said, tmp_path)
