"""llama.cpp's importance matrix: sums of the original model's squared inputs, in the layout that readers expect."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers

import calibrant as cb
from calibrant.errors import CalibrantError
from calibrant.formats.imatrix import gguf_names
from tests.conftest import random_set


def read(path: Path) -> tuple[dict[str, object], dict[str, np.ndarray]]:
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    return fields, {tensor.name: tensor.data for tensor in reader.tensors}


def test_the_file_contains_the_sums_of_squared_inputs(llama: Path, tmp_path: Path) -> None:
    calibration = random_set(llama)
    layers = cb.write_importance_matrix(llama, calibration=calibration, output=tmp_path / "i.gguf", dtype="float32")
    fields, tensors = read(tmp_path / "i.gguf")
    assert layers == 14
    assert fields == {
        "general.type": "imatrix",
        "imatrix.datasets": [f"calibrant:sha256:{calibration.sha256}"],
        "imatrix.chunk_count": 8,
        "imatrix.chunk_size": 32,
    }
    model = transformers.AutoModelForCausalLM.from_pretrained(llama).eval()
    sums: dict[str, torch.Tensor] = {}
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    names = gguf_names("llama", 2, [name for name in linears if "layers" in name])
    for module, (name,) in names.items():

        def note(_: torch.nn.Module, args: tuple[torch.Tensor, ...], name: str = name) -> None:
            rows = args[0].reshape(-1, args[0].shape[-1])[calibration.mask.flatten()]
            sums[name] = rows.double().square().sum(0)

        model.get_submodule(module).register_forward_pre_hook(note)
    with torch.no_grad():
        model(calibration.tokens.long())
    assert {name.removesuffix(".in_sum2") for name in tensors if name.endswith("in_sum2")} == set(sums)
    for name, expected in sums.items():
        np.testing.assert_allclose(tensors[f"{name}.in_sum2"], expected[None].numpy(), rtol=1e-4)
        assert tensors[f"{name}.counts"].tolist() == [[int(calibration.mask.sum())]]


def test_the_same_command_gives_the_same_bytes_and_replaces_only_when_asked(llama: Path, tmp_path: Path) -> None:
    options = {"calibration": random_set(llama), "output": tmp_path / "i.gguf"}
    cb.write_importance_matrix(llama, **options)
    first = (tmp_path / "i.gguf").read_bytes()
    with pytest.raises(CalibrantError, match="exists"):
        cb.write_importance_matrix(llama, **options)
    cb.write_importance_matrix(llama, **options, overwrite=True)
    assert (tmp_path / "i.gguf").read_bytes() == first
    assert [path.name for path in tmp_path.iterdir()] == ["i.gguf"]


def test_a_file_that_differs_from_the_measurement_is_refused(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong(gguf.GGUFReader):
        def __init__(self, path: Path) -> None:
            super().__init__(path, "c")
            self.tensors[0].data[:] += 1

    monkeypatch.setattr(gguf, "GGUFReader", Wrong)
    with pytest.raises(CalibrantError, match="differs from what was measured"):
        cb.write_importance_matrix(llama, calibration=random_set(llama), output=tmp_path / "i.gguf")
    assert not list(tmp_path.iterdir())


def test_names_of_model_types_that_llama_cpp_spells_differently() -> None:
    module = "gpt_neox.layers.0.mlp.dense_h_to_4h"
    assert gguf_names("gpt_neox", 1, [module])[module] == ["blk.0.ffn_up.weight"]


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_experts_have_the_sums_of_the_tokens_sent_to_them(model_folder, tmp_path: Path, architecture: str) -> None:
    model = model_folder(architecture)
    calibration = random_set(model, masked=5)
    layers = cb.write_importance_matrix(model, calibration=calibration, output=tmp_path / "i.gguf", dtype="float32")
    _, tensors = read(tmp_path / "i.gguf")
    assert layers == 2 * (4 + 3)  # attention, and gates, ups and downs of all experts
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, experts_implementation="eager"
    ).eval()
    seen = {}
    experts = loaded.get_submodule("model.layers.1.mlp.experts")
    experts.register_forward_pre_hook(lambda _, args: seen.update(args=args))
    with torch.no_grad():
        loaded(calibration.tokens.long())
    hidden, chosen, _ = seen["args"]
    hidden, counted = hidden.reshape(-1, hidden.shape[-1]), calibration.mask.flatten()
    for expert in range(4):
        mine = hidden[counted & (chosen == expert).any(1)]
        gate, up = (mine @ part.T for part in experts.gate_up_proj[expert].detach().chunk(2))
        after = torch.nn.functional.silu(gate) * up
        for name, inputs in (("gate", mine), ("up", mine), ("down", after)):
            sums = tensors[f"blk.1.ffn_{name}_exps.weight.in_sum2"][expert]
            np.testing.assert_allclose(sums, inputs.double().square().sum(0), rtol=1e-3, atol=1e-12)
            assert tensors[f"blk.1.ffn_{name}_exps.weight.counts"][expert].tolist() == [len(mine)]


def test_experts_whose_gates_and_ups_stay_fused_have_one_name() -> None:
    module = "model.layers.0.experts.gate_up_proj"
    assert gguf_names("gemma4", 1, [module])[module] == ["blk.0.ffn_gate_up_exps.weight"]


def test_layers_without_a_name_are_refused() -> None:
    with pytest.raises(CalibrantError, match="has no name for this layer"):
        gguf_names("llama", 2, ["model.layers.0.self_attn.something"])
    assert gguf_names("qwen2", 1, ["model.layers.0.mlp.up_proj"])["model.layers.0.mlp.up_proj"] == [
        "blk.0.ffn_up.weight"
    ]
