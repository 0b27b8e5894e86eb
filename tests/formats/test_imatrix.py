"""llama.cpp's importance matrix: sums of the original model's squared inputs, in the layout that readers expect."""

from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import gguf
import numpy as np
import pytest
import torch
import transformers as hf

import calibrant as cb
from calibrant.errors import CalibrantError
from calibrant.progress import NoProgress
from tests.conftest import CONTEXT, VOCABULARY, random_set, write_model, write_tokenizer


class ReadsNoBlock(NoProgress):
    """Fails where blocks begin to be read."""

    def task(self, label: str, total: int | None, unit: str = "") -> NoReturn:
        raise AssertionError(f"{label} has begun")


class Notes(NoProgress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def read(path: Path) -> tuple[dict[str, object], dict[str, np.ndarray]]:
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    return fields, {tensor.name: tensor.data for tensor in reader.tensors}


def test_the_file_contains_the_sums_of_squared_inputs(llama: Path, tmp_path: Path) -> None:
    calibration = random_set(llama)
    written = cb.write_importance_matrix(llama, calibration=calibration, output=tmp_path / "i.gguf", dtype="float32")
    fields, tensors = read(tmp_path / "i.gguf")
    assert len(written.tensors) == 14
    assert written.left_out == ()
    assert written.architecture == "llama"
    assert fields == {
        "general.type": "imatrix",
        "imatrix.datasets": [f"calibrant:sha256:{calibration.sha256}"],
        "imatrix.chunk_count": 8,
        "imatrix.chunk_size": 32,
    }
    model = hf.AutoModelForCausalLM.from_pretrained(llama).eval()
    sums: dict[str, torch.Tensor] = {}
    parts = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    parts |= {f"{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")}
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    for module in (name for name in linears if "layers" in name):
        name = f"blk.{module.split('.')[2]}.{parts[module.rpartition('.')[2]]}.weight"

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


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_experts_have_the_sums_of_the_tokens_sent_to_them(model_folder, tmp_path: Path, architecture: str) -> None:
    model = model_folder(architecture)
    calibration = random_set(model, masked=5)
    written = cb.write_importance_matrix(model, calibration=calibration, output=tmp_path / "i.gguf", dtype="float32")
    _, tensors = read(tmp_path / "i.gguf")
    assert len(written.tensors) == 2 * (4 + 3)  # attention, and gates, ups and downs of all experts
    loaded = hf.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, experts_implementation="eager").eval()
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


_TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_ATTENTION = {"attn_q", "attn_k", "attn_v", "attn_output"}
_MLP = {"ffn_gate", "ffn_up", "ffn_down"}
_EXPERTS = {"ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"}
_SHARED = {"ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp"}
_LATENT = {"attn_q_a", "attn_q_b", "attn_kv_a_mqa", "attn_v_b", "attn_output"}


def deepseek_v3() -> hf.PreTrainedModel:
    latent = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
    sizes = {**_TINY, "num_key_value_heads": 4, "moe_intermediate_size": 32, "first_k_dense_replace": 1}
    return hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**sizes, **latent, **experts))


def gemma3_wrapper() -> hf.PreTrainedModel:
    text = {**_TINY, "head_dim": 16, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    images = {"image_token_index": 100, "boi_token_index": 101, "eoi_token_index": 102, "mm_tokens_per_image": 4}
    config = hf.Gemma3Config(text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14}, **images)
    return hf.Gemma3ForConditionalGeneration(config)


def granitemoe() -> hf.PreTrainedModel:
    return hf.GraniteMoeForCausalLM(hf.GraniteMoeConfig(**_TINY, num_local_experts=4, num_experts_per_tok=2))


def granitemoeshared() -> hf.PreTrainedModel:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 48}
    return hf.GraniteMoeSharedForCausalLM(hf.GraniteMoeSharedConfig(**_TINY, **experts))


def olmoe() -> hf.PreTrainedModel:
    return hf.OlmoeForCausalLM(hf.OlmoeConfig(**_TINY, num_experts=4, num_experts_per_tok=2))


def falcon_h1() -> hf.PreTrainedModel:
    mamba = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16}
    return hf.FalconH1ForCausalLM(hf.FalconH1Config(**_TINY, **mamba))


@pytest.mark.parametrize(
    ("make", "architecture", "first", "last", "left_out"),
    [
        (deepseek_v3, "deepseek2", _LATENT | _MLP, _LATENT | _EXPERTS | _SHARED, ("attn_k_b", "attn_k_b")),
        (gemma3_wrapper, "gemma3", _ATTENTION | _MLP, _ATTENTION | _MLP, ()),
        (granitemoe, "granitemoe", _ATTENTION | _EXPERTS, _ATTENTION | _EXPERTS, ()),
        (granitemoeshared, "granitemoe", _ATTENTION | _EXPERTS | _SHARED, _ATTENTION | _EXPERTS | _SHARED, ()),
        (olmoe, "olmoe", _ATTENTION | _EXPERTS, _ATTENTION | _EXPERTS, ()),
        (falcon_h1, "falcon-h1", {"ssm_in", "ssm_out"} | _ATTENTION | _MLP, _ATTENTION | _MLP, ()),
    ],
)
def test_layers_have_the_names_of_the_converters_architecture(
    tmp_path: Path,
    make: Callable[[], hf.PreTrainedModel],
    architecture: str,
    first: set[str],
    last: set[str],
    left_out: tuple[str, ...],
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        make().save_pretrained(tmp_path / "m")
    write_tokenizer(tmp_path / "m")
    calibration = random_set(tmp_path / "m", samples=2)
    progress = Notes()
    written = cb.write_importance_matrix(
        tmp_path / "m", calibration=calibration, output=tmp_path / "i.gguf", progress=progress
    )
    assert written.architecture == architecture
    named = {name.removesuffix(".weight") for name in written.tensors}
    assert first == {name.removeprefix("blk.0.") for name in named if name.startswith("blk.0.")}
    assert last <= {name.removeprefix("blk.1.") for name in named if name.startswith("blk.1.")}
    assert left_out == tuple(name.split(".")[2] for name in written.left_out)
    assert bool(left_out) == any("left out" in note for note in progress.notes)


def test_values_of_latent_attention_have_the_compressed_vectors_of_every_head(tmp_path: Path) -> None:
    deepseek_v3().save_pretrained(tmp_path / "m")
    write_tokenizer(tmp_path / "m")
    calibration = random_set(tmp_path / "m", samples=2)
    cb.write_importance_matrix(tmp_path / "m", calibration=calibration, output=tmp_path / "i.gguf", dtype="float32")
    _, tensors = read(tmp_path / "i.gguf")
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    seen: list[torch.Tensor] = []
    layer = model.get_submodule("model.layers.0.self_attn.kv_b_proj")
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(calibration.tokens.long())
    expected = seen[0].flatten(0, -2).double().square().sum(0)
    sums = tensors["blk.0.attn_v_b.weight.in_sum2"]  # llama.cpp refuses other sizes: columns times heads
    np.testing.assert_allclose(sums, expected.expand(4, -1).numpy(), rtol=1e-4)
    assert tensors["blk.0.attn_v_b.weight.counts"].tolist() == [[int(calibration.mask.sum())]] * 4


def test_a_model_without_names_is_refused_before_its_blocks_are_read(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "opt", "opt")
    with pytest.raises(CalibrantError, match=r"which architecture of llama\.cpp opt models become is not known"):
        cb.write_importance_matrix(
            folder, calibration=random_set(folder), output=tmp_path / "m.gguf", progress=ReadsNoBlock()
        )
