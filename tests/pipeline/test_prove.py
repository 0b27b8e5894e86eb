"""Proof in an engine: real engines agree with what is stored, and what they read otherwise is found out."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import calibrant as cb
from calibrant.cli.main import app
from calibrant.formats.gguf_types import GGUF_TYPES
from calibrant.modeling.checkpoint import ModelFolder
from calibrant.modeling.dequantized_model import load_dequantized
from calibrant.modeling.whole_model import load_whole
from calibrant.pipeline import prove
from tests.conftest import random_set

from ..formats.test_packed_experts import saved
from .test_write_gguf import _SHAPE, compressed, write

VLLM = Path(__file__).parents[2] / ".vllm" / "bin" / "python"
SHORT: dict[str, Any] = {"length": 24, "windows": 1, "new_tokens": 12}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("prove") / "model")


def made(model: Path, output: Path, recipe: str) -> Path:
    cb.compress(model, recipe=recipe, output=output, calibration=random_set(model, 8, 32))
    return output


@pytest.mark.parametrize("recipe", ["gptq-w4a16", "rtn-w8a8", "rtn-w8a8-static", "wanda-50", "rtn-fp8-kv-fp8"])
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


def test_a_python_may_be_given_by_a_path_from_here(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(sys.executable).parent)
    assert cb.prove(made(model, tmp_path / "out", "rtn-fp8"), python=Path(sys.executable).name, **SHORT).agrees


def test_asymmetric_weights_are_loaded_as_the_note_says(model: Path, tmp_path: Path) -> None:
    recipe = cb.builtin_recipes()["gptq-w4a16-g128-asym"].with_weights(None, 32)
    cb.compress(model, recipe=recipe, output=tmp_path / "out", calibration=random_set(model, 8, 32))
    assert cb.prove(tmp_path / "out", **SHORT).difference < 1e-3


@pytest.mark.parametrize(
    ("recipe", "why"), [("rtn-w8a8", "it rounds no inputs"), ("rtn-fp8", "log-probabilities differ")]
)
def test_an_engine_that_rounds_no_inputs_is_found_out(
    model: Path, tmp_path: Path, recipe: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = made(model, tmp_path / "out", recipe)
    plain = load_dequantized(ModelFolder(output, allow_quantized=True), torch.device("cpu"), torch.float32)
    plain.save_pretrained(tmp_path / "plain")
    ask = prove.ask
    monkeypatch.setattr(
        prove, "ask", lambda engine, python, one: ask(engine, python, replace(one, model=str(tmp_path / "plain")))
    )
    with pytest.raises(cb.CalibrantError, match=f"does not compute what is stored.*{why}"):
        cb.prove(output, **SHORT)
    (proof,) = cb.RunRecord.read(output).proofs
    assert not proof.agrees
    assert proof.unrounded < 0.01 < proof.difference


def test_blocks_of_gguf_types_are_for_llama_cpp_alone(model: Path, tmp_path: Path) -> None:
    output = made(model, tmp_path / "out", "gptq-q4_0")
    with pytest.raises(cb.CalibrantError, match=r"only llama\.cpp reads its blocks"):
        cb.prove(output, **SHORT)
    assert "llama-cli -m path/to/this/folder/model.gguf" in (output / "README.md").read_text()


def snippet(output: Path) -> str:
    """The code of the model card, for the folder itself."""
    card = (output / "README.md").read_text()
    return card.split("```python\n")[1].split("```")[0].replace("path/to/this/folder", str(output))


@pytest.mark.parametrize("recipe", ["gptq-w4a16-g32", "asymmetric", "gptq-mxfp4a16", "rtn-w8a8", "wanda-50"])
def test_the_code_of_the_model_card_loads_the_model(model: Path, tmp_path: Path, recipe: str) -> None:
    chosen: Any = recipe
    if recipe == "asymmetric":
        chosen = cb.builtin_recipes()["gptq-w4a16-g128-asym"].with_weights(None, 32)
    cb.compress(model, recipe=chosen, output=tmp_path / "out", calibration=random_set(model, 8, 32))
    found: dict[str, Any] = {}
    exec(snippet(tmp_path / "out"), found)  # our own
    with torch.no_grad():
        logits = found["model"](torch.arange(3, 20)[None]).logits
        wanted = load_whole(ModelFolder(tmp_path / "out", allow_quantized=True), "cpu", "float32")(
            torch.arange(3, 20)[None]
        ).logits
    assert (logits.float() - wanted).norm() < 0.05 * wanted.norm()


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
    output = compressed(model, tmp_path / "out", dtype="float32")
    proof = cb.prove(output, engine="llama.cpp", against=model, **SHORT)
    assert proof.agrees
    assert proof.kl is not None
    exact = cb.evaluate(output, against=model, length=24, limit=1, dtype="float32").divergence
    assert exact is not None
    assert 0.5 * exact.kl_mean < proof.kl < 1.5 * exact.kl_mean
    other = compressed(model, tmp_path / "other", bits=2)
    cb.write_gguf(other, output=tmp_path / "other.gguf")
    with pytest.raises(cb.CalibrantError, match="does not compute what is stored"):
        cb.prove(output, engine="llama.cpp", gguf=tmp_path / "other.gguf", **SHORT)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With inputs that super-blocks of 256 divide, but for one kind of layer."""
    sizes = {**_SHAPE, "hidden_size": 256, "intermediate_size": 320, "initializer_range": 0.1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes))
    folder = write(tmp_path_factory.mktemp("wide") / "model")
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", GGUF_TYPES)
def test_every_type_of_gguf_files_runs_in_llama_cpp(wide: Path, tmp_path: Path, kind: str) -> None:
    """And computes what is stored, with the rounding of inputs that llama.cpp has for the type."""
    pytest.importorskip("xllamacpp", reason="xllamacpp, which runs llama.cpp, is not installed")
    output = made(wide, tmp_path / "out", f"gptq-{kind}")
    known = GGUF_TYPES[kind]
    expected = {kind.upper()} | ({known.fallback.upper()} if known.fallback else set())
    found = {one.tensor_type.name for one in gguf.GGUFReader(output / "model.gguf").tensors if "blk" in one.name}
    assert found == expected | {"F32"}
    assert any("inputs that super-blocks" in note for note in cb.RunRecord.read(output).notes) == bool(known.fallback)
    decoded = ModelFolder(output, dequantize=True)
    assert {name: info.shape for name, info in decoded.tensors.items()} == {
        name: info.shape for name, info in ModelFolder(wide).tensors.items()
    }
    proof = cb.prove(output, engine="llama.cpp", gguf=output / "model.gguf", **SHORT)
    # Inputs between two int8 numbers go either way, and sums of minima are float16 there.
    assert proof.difference < 0.03


def test_a_budget_mixes_types(wide: Path, tmp_path: Path) -> None:
    """Layers that super-blocks do not divide take fallbacks, whose bits count."""
    pytest.importorskip("xllamacpp", reason="xllamacpp, which runs llama.cpp, is not installed")
    weights = {"type": "q4_k", "range_search": "importance"}
    said = {"name": "mixed", "description": "d", "method": {"name": "gptq"}, "scheme": {"weights": weights}}
    recipe = cb.Recipe.model_validate({**said, "budget": {"choices": ["q2_k", "q4_k", "q6_k"], "average": 4.5}})
    output = tmp_path / "out"
    report = cb.compress(wide, recipe=recipe, output=output, calibration=random_set(wide, 8, 32))
    assert any(note.startswith("budget: types of groups of layers") for note in report.notes)
    budget = json.loads((output / "calibrant.json").read_text())["budget"]
    types = {
        layer: choice
        for one, choice in zip(budget["sensitivities"], budget["chosen"], strict=True)
        for layer in one["layers"]
    }
    assert len(set(types.values())) > 1
    stored = json.loads((output / "config.json").read_text())["quantization_config"]["types"]
    for layer, choice in types.items():
        assert stored[layer] == (GGUF_TYPES[choice].fallback if layer.endswith("down_proj") else choice)
    tensors = gguf.GGUFReader(output / "model.gguf").tensors
    blocks = [one for one in tensors if one.name.startswith("blk") and "norm" not in one.name]
    bits = 8 * sum(int(one.n_bytes) for one in blocks) / sum(int(one.n_elements) for one in blocks)
    assert bits == pytest.approx(budget["average"])
    assert bits <= 4.5
    assert cb.prove(output, engine="llama.cpp", gguf=output / "model.gguf", **SHORT).difference < 0.03


@pytest.mark.parametrize("kind", ["Q6_K", "Q4_K", "Q5_0", "Q4_0"])
def test_embeddings_have_a_type_of_their_own(wide: Path, tmp_path: Path, kind: str) -> None:
    pytest.importorskip("xllamacpp", reason="xllamacpp, which runs llama.cpp, is not installed")
    output, file = made(wide, tmp_path / "out", "gptq-q4_0"), tmp_path / "out.gguf"
    found = cb.write_gguf(output, output=file, embeddings=kind)  # type: ignore[arg-type]
    assert any(f"rounded to {kind}" in note for note in found.notes)
    tensors = {one.name: one.tensor_type.name for one in gguf.GGUFReader(file).tensors}
    assert (tensors["token_embd.weight"], tensors["output.weight"]) == (kind, kind)
    assert cb.prove(output, engine="llama.cpp", gguf=file, **SHORT).difference < 0.03


def test_integers_become_the_type_that_has_them(wide: Path, tmp_path: Path) -> None:
    given = random_set(wide, 8, 32)
    for recipe, kind in (("gptq-w4a16", "Q4_0"), ("gptq-w4a16-g128-asym", "Q4_1"), ("gptq-w8a16", "Q8_0")):
        cb.compress(wide, recipe=recipe, output=tmp_path / kind, calibration=given, checkpoint_format="gguf")
        tensors = gguf.GGUFReader(tmp_path / kind / "model.gguf").tensors
        assert {one.tensor_type.name for one in tensors if "blk" in one.name} == {kind, "F32"}


@pytest.mark.parametrize(("recipe", "options", "said"), [
    ("gptq-nvfp4a16", {"checkpoint_format": "gguf"}, "no type of GGUF files has nvfp4"),
    ("rtn-w8a8", {"checkpoint_format": "gguf"}, "GGUF files say nothing of activations"),
    ("gptq-w4a16-budget", {"checkpoint_format": "gguf"}, "leave gguf out"),
    ("gptq-q4_k", {"checkpoint_format": "awq"}, "q4_k is a type of GGUF files: leave out the awq format"),
    ("gptq-q4_k", {"bits": 3}, "q4_k weights have 4 bits, groups of 32 and minima"),
])  # fmt: skip
def test_what_no_type_has_is_refused(
    wide: Path, tmp_path: Path, recipe: str, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(cb.CalibrantError, match=said):
        cb.compress(wide, recipe=recipe, output=tmp_path / "no", **options)
    assert not (tmp_path / "no").exists()


def test_models_that_llama_cpp_has_in_another_way_are_refused_before_any_work(
    model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(cb.CalibrantError, match="phi models are not written as GGUF files here"):
        cb.prepare(model_folder("phi"), recipe="gptq-q4_0", output=tmp_path / "no")


def test_blocks_that_do_not_divide_a_fallback_are_refused(tmp_path: Path) -> None:
    """16 divides the inputs, as Q2_K's groups want it, and 32 does not, as its fallback wants it."""
    model = write(tmp_path / "model")
    config = hf.LlamaConfig(**{**_SHAPE, "hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 3})
    hf.LlamaForCausalLM(config).save_pretrained(model)
    with pytest.raises(cb.CalibrantError, match="blocks of 32 weights of the type q4_0 do not divide its 48 inputs"):
        cb.prepare(model, recipe="gptq-q2_k", output=tmp_path / "no", calibration=random_set(model, 8, 32))


def test_four_bit_floats_name_no_other_group_size(tmp_path: Path) -> None:
    model = write(tmp_path / "model")
    hf.LlamaForCausalLM(hf.LlamaConfig(**{**_SHAPE, "intermediate_size": 80})).save_pretrained(model)
    with pytest.raises(cb.CalibrantError, match="mxfp4 has no other size: ignore these layers"):
        cb.prepare(model, recipe="gptq-mxfp4a16", output=tmp_path / "no", calibration=random_set(model, 8, 32))


def test_a_training_has_no_type_of_gguf_files(model: Path, tmp_path: Path) -> None:
    scheme = {"weights": {"bits": 4, "group_size": 32}}
    said = {"name": "trained", "description": "d", "method": {"name": "qat", "steps": 1}, "scheme": scheme}
    with pytest.raises(cb.CalibrantError, match="qat trains integers"):
        cb.prepare(
            model, recipe=cb.Recipe.model_validate(said), output=tmp_path / "no", checkpoint_format="gguf",
            calibration=random_set(model, 8, 64),
        )  # fmt: skip


def test_files_may_name_tensors_without_the_prefix(wide: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="xllamacpp, which runs llama.cpp, is not installed")
    model = Path(shutil.copytree(wide, tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    short = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(short, model / "model.safetensors", {"format": "pt"})
    output = made(model, tmp_path / "out", "gptq-q4_k")
    assert cb.prove(output, engine="llama.cpp", **SHORT).difference < 0.03


@pytest.mark.parametrize(("recipe", "bits"), [("gptq-w8a8", 7), ("rtn-fp8", None)])
def test_vllm_computes_what_is_stored(tmp_path: Path, recipe: str, bits: int | None) -> None:
    """Of int8 with seven bits: on processors without VNNI its sums of products of eight bits overflow."""
    if not VLLM.is_file():
        pytest.skip("vLLM's environment is not there: make vllm")
    model = write(tmp_path / "model", "qwen3")  # heads of 32, the least that vLLM has
    output = tmp_path / "out"
    cb.compress(model, recipe=recipe, bits=bits, output=output, calibration=random_set(model, 8, 32))
    proof = cb.prove(output, engine="vllm", python=VLLM, **SHORT)
    assert proof.difference < 0.005


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
    ({"windows": 0}, "windows 0: need at least 1"),
    ({"length": 1}, "length 1: need at least 2"),
    ({"gguf": "x.gguf"}, "only llama.cpp loads GGUF files, not transformers"),
    ({"dtype": "int4"}, "int4: no such dtype"),
])  # fmt: skip
def test_what_cannot_be_asked_is_refused(model: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(cb.CalibrantError, match=said):
        cb.prove(model, **{**SHORT, **options})


def test_what_is_no_gguf_file_is_named(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="xllamacpp, which runs llama.cpp, is not installed")
    with pytest.raises(cb.CalibrantError, match=r"x\.gguf: no such file"):
        cb.prove(model, engine="llama.cpp", gguf=tmp_path / "x.gguf", **SHORT)
    (tmp_path / "x.gguf").touch()
    with pytest.raises(cb.CalibrantError, match=r"x\.gguf: is no GGUF file"):
        cb.prove(model, engine="llama.cpp", gguf=tmp_path / "x.gguf", **SHORT)


def test_an_engine_that_fails_is_quoted(model: Path, tmp_path: Path) -> None:
    """transformers has no GPTQ without a package more."""
    output = compressed(model, tmp_path / "out")
    with pytest.raises(cb.CalibrantError, match=r"transformers fails on it .*requires optimum"):
        cb.prove(output, **SHORT)
