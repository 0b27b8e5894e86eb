"""Quantized models opened as the dense ones that they stand for."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import calibrant as cb
from calibrant.modeling.checkpoint import ModelFolder
from calibrant.modeling.whole_model import load_whole
from tests.conftest import random_set, write_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 100, "hidden_size": 160, "intermediate_size": 320, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "initializer_range": 0.1, "pad_token_id": 0, "dtype": "float32",
}  # fmt: skip


def saved(folder: Path, config: hf.PretrainedConfig) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("dense") / "model", hf.LlamaConfig(**SIZES))


def changed(folder: Path, tensors: dict[str, torch.Tensor], settings: dict[str, Any]) -> Path:
    """``folder`` with other tensors and a ``quantization_config``."""
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return folder


def logits(folder: ModelFolder) -> torch.Tensor:
    with torch.inference_mode():
        return load_whole(folder, "cpu", "float32")(torch.arange(4, 40)[None]).logits


@pytest.mark.parametrize(("recipe", "checkpoint_format"), [
    ("gptq-w4a16-g32", "compressed-tensors"), ("gptq-w4a16-g32", "gptq"), ("rtn-w8a8", "compressed-tensors"),
    ("rtn-fp8", "compressed-tensors"), ("gptq-nvfp4a16", "compressed-tensors"),
])  # fmt: skip
def test_outputs_are_compressed_again_from_their_decoded_weights(
    model: Path, tmp_path: Path, recipe: str, checkpoint_format: str
) -> None:
    first = tmp_path / "first"
    cb.compress(
        model,
        recipe=recipe,
        output=first,
        calibration=random_set(model, 8, 32),
        checkpoint_format=checkpoint_format,  # type: ignore[arg-type]
    )
    with pytest.raises(cb.CalibrantError, match="quantized already; start from its original weights, or ask for it to"):
        cb.compress(first, recipe="rtn-w8a16", output=tmp_path / "second")
    cb.compress(first, recipe="rtn-w8a16", output=tmp_path / "second", dequantize=True)
    plain = ModelFolder(first, dequantize=True)
    assert plain.quantization is None
    assert {info.dtype for info in plain.tensors.values()} == {"F32"}
    decoded, again = logits(plain), logits(ModelFolder(tmp_path / "second", allow_quantized=True))
    assert (decoded - again).norm() < 0.05 * decoded.norm()
    written = cb.generate(first, samples=2, length=8, dequantize=True)
    assert written.tokens.shape == (2, 8)


def test_fp8_in_blocks_that_are_cut_off_is_decoded(model: Path, tmp_path: Path) -> None:
    """As DeepSeek-V3's and Qwen 3's own checkpoints have it, with sizes that 128 does not divide."""
    folder = saved(tmp_path / "model", hf.LlamaConfig(**SIZES))
    tensors, expected = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        weight = tensors[name]
        rows, columns = (-(-size // 128) for size in weight.shape)
        scale = torch.rand(rows, columns) + 0.01
        whole = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: weight.shape[0], : weight.shape[1]]
        tensors[name] = (weight / whole).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale
        expected[name] = tensors[name].float() * whole
    settings = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    opened = ModelFolder(changed(folder, tensors, settings), dequantize=True)
    for name, weight in expected.items():
        assert opened.tensors[name].shape == tuple(weight.shape)
        assert torch.equal(opened.read(name), weight)
    cb.compress(folder, recipe="rtn-w8a16", output=tmp_path / "out", dequantize=True)
    assert "quantization_config" in json.loads((tmp_path / "out" / "config.json").read_text())
    found, wanted = logits(ModelFolder(tmp_path / "out", allow_quantized=True)), logits(opened)
    assert (found - wanted).norm() < 0.05 * wanted.norm()


def test_gpt_oss_is_decoded_as_transformers_does_it(tmp_path: Path) -> None:
    config = hf.GptOssConfig(**{**SIZES, "hidden_size": 64, "intermediate_size": 96}, num_local_experts=4)
    folder = saved(tmp_path / "model", config)
    tensors, expected = load_file(folder / "model.safetensors"), {}
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        shape = (experts, rows, columns // 32)
        blocks = torch.randint(0, 256, (*shape, 16), generator=generator).to(torch.uint8)
        scales = torch.randint(118, 124, shape, generator=generator).to(torch.uint8)
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = blocks, scales
        expected[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    opened = ModelFolder(changed(folder, tensors, {"quant_method": "mxfp4"}), dequantize=True)
    for name, weight in expected.items():
        assert opened.tensors[name].shape == tuple(weight.shape)
        assert torch.equal(opened.read(name), weight)
    cb.compress(folder, recipe="rtn-w8a16", output=tmp_path / "out", dequantize=True)
    found, wanted = logits(ModelFolder(tmp_path / "out")), logits(opened)
    assert (found - wanted).norm() < 0.1 * wanted.norm()


def test_what_is_not_quantized_or_not_known_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(cb.CalibrantError, match="is not quantized, so there is nothing to decode"):
        ModelFolder(model, dequantize=True)
    folder = saved(tmp_path / "model", hf.LlamaConfig(**SIZES))
    changed(folder, load_file(folder / "model.safetensors"), {"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(cb.CalibrantError, match="weights quantized as bitsandbytes, which is not read here"):
        cb.compress(folder, recipe="rtn-w8a16", output=tmp_path / "no", dequantize=True)
