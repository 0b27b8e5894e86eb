"""Model folders as people have them: every tensor is accounted for, and the output loads wherever the source does."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import calibrant as cb
from calibrant.errors import CalibrantError
from calibrant.modeling.checkpoint import ModelFolder
from tests.conftest import CONTEXT, random_set

Tensors = dict[str, torch.Tensor]
LAYER = "model.layers.0."
UP = LAYER + "mlp.up_proj"


@pytest.fixture
def model(llama: Path, tmp_path: Path) -> Path:
    return shutil.copytree(llama, tmp_path / "model")


def edit(folder: Path, change: Callable[[Tensors], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def add(**tensors: torch.Tensor) -> Callable[[Tensors], None]:
    return lambda stored: stored.update({name.replace("__", "."): tensor for name, tensor in tensors.items()})


def put(name: str, tensor: torch.Tensor) -> Callable[[Tensors], None]:
    return lambda stored: stored.update({name: tensor})


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def compress(model: Path, recipe: str | cb.Recipe = "rtn-w8a16", **options) -> Path:
    output = model.parent / "out"
    cb.compress(model, output=output, recipe=recipe, dtype="float32", **options)
    return output


def logits(folder: Path) -> torch.Tensor:
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return loaded(input_ids=random_set(seed=9).tokens.long()).logits


def assert_same_model(output: Path, source: Path) -> None:
    """Eight bits change logits by a hundredth or two."""
    wanted = logits(source)
    assert (logits(output) - wanted).norm() < 0.05 * wanted.norm()


def fp8(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.update({f"{UP}.weight": fp8(t[f"{UP}.weight"])}), f"{UP}.weight is stored as F8_E4M3"),
        (lambda t: t.update({f"{UP}.weight": t[f"{UP}.weight"].to(torch.int8)}), f"{UP}.weight is stored as I8"),
        (lambda t: t.update({"model.norm.weight": fp8(t["model.norm.weight"])}), "model.norm.weight is stored as F8"),
        (put("mtp.fc.weight", fp8(torch.ones(4, 4))), "mtp.fc.weight is stored as F8_E4M3"),
        (put("extra.qweight", torch.ones(4, 4, dtype=torch.int32)), "extra.qweight is stored as I32"),
        (put(f"{UP}.weight_scale", torch.ones(1)), f"{UP}.weight_scale belongs to layer {UP}"),
        (put(f"{UP}.weight_scale_inv", torch.ones(1, 1)), f"{UP}.weight_scale_inv belongs to layer {UP}"),
        (put(f"{LAYER}self_attn.q_proj.bias", torch.ones(64)), "q_proj.bias belongs to layer"),
        (put(f"{UP}.lora_A.weight", torch.ones(4, 64)), f"{UP}.lora_A.weight belongs to layer {UP}"),
        (put(f"{UP}.lora_B.default.weight", torch.ones(96, 4)), f"belongs to layer {UP}"),
        (put(f"{LAYER}self_attn.q_proj.bias", torch.ones(1, 1, 64, 1)), "q_proj.bias belongs to layer"),
        (put(f"{LAYER}self_attn.q_proj.masked_bias", torch.ones(1)), "masked_bias belongs to layer"),
        (put("model.norm.bias", torch.ones(64)), "model.norm.bias belongs to layer model.norm"),
        (put("lm_head.bias", torch.ones(128)), "lm_head.bias belongs to layer lm_head"),
    ],
)
def test_codes_and_lost_values_are_refused(model: Path, change: Callable[[Tensors], None], said: str) -> None:
    edit(model, change)
    with pytest.raises(CalibrantError, match=said):
        compress(model)
    with pytest.raises(CalibrantError, match=said):
        cb.evaluate(model, text=cb.Corpus(["a text of many words " * 20]), length=16, limit=1)


@pytest.mark.parametrize(
    ("architecture", "prefix", "left"),
    [
        ("llama", "model.", "layers.0.self_attn.q_proj.lora_A.weight"),
        ("llama", "model.", "layers.1.mlp.up_proj.weight_scale_inv"),
        ("gpt2", "transformer.", "h.0.attn.c_attn.SCB"),
        ("mixtral", "", "model.layers.0.block_sparse_moe.experts.1.w2.bias"),
    ],
)
def test_what_belongs_to_a_layer_under_another_name(
    model_folder, tmp_path: Path, architecture: str, prefix: str, left: str
) -> None:
    model = shutil.copytree(model_folder(architecture), tmp_path / "model")
    tensors = {name.removeprefix(prefix): tensor for name, tensor in load_file(model / "model.safetensors").items()}
    save_file({**tensors, left: torch.ones(4)}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(CalibrantError, match="belongs to layer"):
        compress(model)


@pytest.mark.parametrize("name", ["input_layernorm.weight", "post_attention_layernorm.weight"])
def test_values_that_are_not_finite_beside_the_linears_of_a_block(model: Path, name: str) -> None:
    edit(model, lambda stored: stored[f"model.layers.1.{name}"][3].fill_(float("nan")))
    with pytest.raises(CalibrantError, match="not finite"):
        compress(model)


@pytest.mark.parametrize("checkpoint_format", ["compressed-tensors", "gptq", "awq"])
@pytest.mark.parametrize("lost", ["model.norm.weight", "model.layers.1.self_attn.q_proj."])
def test_an_output_that_lost_tensors_is_not_evaluated(model: Path, checkpoint_format: str, lost: str) -> None:
    recipe = cb.load_recipe("rtn-w8a16").with_weights(4, 32)
    output = compress(model, recipe, checkpoint_format=checkpoint_format)

    def remove(stored: Tensors) -> None:
        for name in [name for name in stored if name.startswith(lost)]:
            del stored[name]

    edit(output, remove)
    with pytest.raises(CalibrantError, match="lack"):
        cb.evaluate(output, text=cb.Corpus(["many words " * 50]), length=16, limit=1)


@pytest.mark.parametrize("checkpoint_format", ["compressed-tensors", "gptq"])
def test_an_output_with_values_that_no_layer_takes_is_not_evaluated(model: Path, checkpoint_format: str) -> None:
    recipe = cb.load_recipe("rtn-w8a16").with_weights(4, 32)
    output = compress(model, recipe, checkpoint_format=checkpoint_format)
    bias = f"{LAYER}self_attn.q_proj.bias"
    edit(output, put(bias, torch.zeros(64)))
    text = cb.Corpus(["many words " * 50])
    assert cb.evaluate(output, text=text, length=16, limit=1).tokens == 15
    edit(output, put(bias, torch.ones(64)))
    with pytest.raises(CalibrantError, match="does not take it"):
        cb.evaluate(output, text=text, length=16, limit=1)


def test_what_no_layer_takes_is_copied_and_named(model: Path) -> None:
    extra = {"mtp.fc.weight": torch.randn(4, 8), "mtp.norm.weight": torch.ones(8)}
    behind = {"model.layers.2.self_attn.q_proj.weight": torch.randn(4, 8), f"{LAYER}self_attn.gate": torch.ones(3)}
    leftovers = {f"{LAYER}self_attn.rotary_emb.inv_freq": torch.ones(8), "model.rotary_emb.inv_freq": torch.ones(8)}
    edit(model, lambda stored: stored.update({**extra, **behind, **leftovers}))
    output = compress(model)
    stored = load_file(output / "model.safetensors")
    for name, tensor in {**extra, **behind}.items():
        assert torch.equal(stored[name], tensor)
    assert not set(leftovers) & set(stored)
    notes = " ".join(cb.RunRecord.read(output).notes)
    assert "no parameter of the model takes them" in notes
    assert "and 3 more tensors" in notes


@pytest.mark.parametrize("checkpoint_format", ["compressed-tensors", "gptq"])
def test_every_matrix_stored_dense_is_in_the_list_of_engines(model: Path, checkpoint_format: str) -> None:
    names = ["mtp.layers.0.mlp.gate_proj", "model.layers.2.self_attn.q_proj", "eh_proj"]
    edit(model, lambda stored: stored.update({f"{name}.weight": torch.randn(8, 8) for name in names}))
    output = compress(model, "gptq-w4a16-g32", calibration=random_set(model), checkpoint_format=checkpoint_format)
    settings = json.loads((output / "config.json").read_text())["quantization_config"]
    if checkpoint_format == "gptq":
        listed = {name.removeprefix("-:^").removesuffix("$").replace("\\", "") for name in settings["dynamic"]}
    else:
        listed = set(settings["ignore"])
    assert set(names) <= listed
    assert "model.embed_tokens" not in listed


def test_the_file_that_transformers_loads_is_compressed(model: Path) -> None:
    other = {name: tensor + 1 for name, tensor in load_file(model / "model.safetensors").items()}
    shard = "model-00001-of-00001.safetensors"
    save_file(other, model / shard, {"format": "pt"})
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(other, shard)}))
    output = compress(model)
    assert_same_model(output, model)
    assert not (output / shard).exists()
    assert any(shard in note for note in cb.RunRecord.read(output).notes)


def test_shards_in_subfolders_and_tensors_that_no_shard_holds(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    (model / "sub").mkdir()
    (model / "model.safetensors").rename(model / "sub" / "part.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys([*tensors, "ghost.weight"], "sub/part.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same_model(compress(model), model)


@pytest.mark.parametrize("named", ["weights.safetensors", "weights.safetensors.index.json"])
def test_weights_that_the_configuration_names(model: Path, named: str) -> None:
    tensors = load_file(model / "model.safetensors")
    save_file({name: 0 * tensor for name, tensor in tensors.items()}, model / "model.safetensors", {"format": "pt"})
    save_file(tensors, model / "weights.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "weights.safetensors")}
    (model / "weights.safetensors.index.json").write_text(json.dumps(index))
    edit_config(model, transformers_weights=named)
    output = compress(model)
    assert_same_model(output, model)
    edit_config(model, transformers_weights="../elsewhere.safetensors")
    with pytest.raises(CalibrantError, match="no file in the folder"):
        ModelFolder(model)


@pytest.mark.parametrize(
    "settings",
    [
        {"quantization_config": None},
        {"compression_config": None},
        {"text_config": None},
        {"quantization_config": None, "compression_config": None},
    ],
)
def test_null_describes_no_quantization(model: Path, settings: dict[str, object]) -> None:
    edit_config(model, **settings)
    assert_same_model(compress(model), model)


@pytest.mark.parametrize(
    "settings",
    [
        {"quantization_config": {"quant_method": "fp8"}},
        {"quantization_config": {}},
        {"compression_config": {"format": "pack-quantized"}},
        {"text_config": {"quantization_config": {"quant_method": "gptq", "bits": 4}}},
    ],
)
def test_a_description_of_quantization_anywhere_is_refused(model: Path, settings: dict[str, object]) -> None:
    edit_config(model, **settings)
    with pytest.raises(CalibrantError, match="quantized already"):
        compress(model)


@pytest.mark.parametrize("number", [float("inf"), float("-inf"), float("nan")])
def test_numbers_that_python_reads(model: Path, number: float) -> None:
    edit_config(model, time_step_limit=[0.0, number])
    output = compress(model)
    assert_same_model(output, model)
    kept = json.loads((output / "config.json").read_text())["time_step_limit"][1]
    assert repr(kept) == repr(number)


@pytest.mark.parametrize("architecture", ["gemma3", "gpt2", "opt", "llama"])
def test_a_tied_matrix_under_its_other_name(model_folder, tmp_path: Path, architecture: str) -> None:
    model = shutil.copytree(model_folder(architecture), tmp_path / "model")
    edit_config(model, tie_word_embeddings=True)
    names = list(load_file(model / "model.safetensors"))
    embedding = next(name for name in names if name.endswith(("embed_tokens.weight", "wte.weight")))

    def rename(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors.pop(embedding)

    edit(model, rename)
    output = compress(model)
    assert_same_model(output, model)
    kept, source = (load_file(folder / "model.safetensors")["lm_head.weight"] for folder in (output, model))
    assert torch.equal(kept, source)


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_outside_the_blocks(model: Path, name: str, value: float) -> None:
    edit(model, lambda stored: stored[name].view(-1)[5 * 64 - 1 if "norm" not in name else 3].fill_(value))
    with pytest.raises(CalibrantError, match=f"{name} has values that are not finite"):
        compress(model, "gptq-w4a16-g32", calibration=random_set(model))
    with pytest.raises(CalibrantError, match="not finite"):
        cb.evaluate(model, text=cb.Corpus(['!"#$%&a text of many words ' * 20]), length=16, limit=1)


def test_rows_of_tokens_that_never_occur_are_noted(model: Path) -> None:
    edit(model, lambda stored: stored["model.embed_tokens.weight"][110].fill_(float("nan")))
    output = compress(model, "gptq-w4a16-g32", calibration=random_set(model))
    assert any("1 rows" in note and "110" in note for note in cb.RunRecord.read(output).notes)


def test_small_files_of_any_name_are_copied(model: Path) -> None:
    kept = ["qwen.tiktoken", "tokenizer.model.v3", "vocab.bpe", "modeling_x.py", "LICENSE", "USAGE.md", "own.spm"]
    dropped = [".gitattributes", "pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth"]
    dropped += ["model.gguf", "optimizer.pt", "trainer_state.json", "README.md"]
    dropped += ["hf_quant_config.json", "quantize_config.json"]
    for name in kept + dropped:
        (model / name).write_text(f"source of {name}")
    output = compress(model)
    assert all((output / name).read_text() == f"source of {name}" for name in kept)
    assert not [name for name in dropped if (output / name).exists() and "source of" in (output / name).read_text()]


def test_subfolders_without_weights_are_copied(model: Path) -> None:
    for name in ("custom_generate/generate.py", "1_Pooling/config.json", "onnx/config.json", "onnx/model.onnx"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(name)
    (model / "1_Pooling" / "loop").symlink_to(model)
    (model / "1_Pooling" / "gone").symlink_to(model / "nothing")
    for name in ("calibration", "vocab.bin"):
        (model / name).write_text("x")
    output = compress(model, "gptq-w4a16-g32", calibration=random_set(model))
    assert (output / "custom_generate" / "generate.py").read_text() == "custom_generate/generate.py"
    assert sorted(path.name for path in (output / "1_Pooling").iterdir()) == ["config.json"]
    assert not (output / "onnx").exists()
    assert any("not copied" in note and "onnx, vocab.bin" in note for note in cb.RunRecord.read(output).notes)


def test_a_large_file_is_left_out_and_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (model / "video.mp4").open("wb") as file:
        file.truncate(2**27)
    output = compress(model)
    assert not (output / "video.mp4").exists()
    assert any("video.mp4" in note for note in cb.RunRecord.read(output).notes)


def test_code_that_the_configuration_names_is_copied(model: Path) -> None:
    edit_config(model, auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"})
    (model / "own.py").write_text(
        "from transformers import LlamaConfig as OwnConfig, LlamaForCausalLM as OwnModel  # noqa\n"
    )
    assert (compress(model) / "own.py").read_text() == (model / "own.py").read_text()


@pytest.mark.parametrize("whole", [True, False])
def test_adapters_are_refused(model: Path, whole: bool) -> None:
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    if not whole:
        (model / "config.json").unlink()
    for use in (compress, lambda path: cb.evaluate(path)):
        with pytest.raises(CalibrantError, match="an adapter of some/base"):
            use(model)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_hidden_layers": 10**5},
        {"num_hidden_layers": 10**9},
        {"num_labels": 10**9},
        {"vision_config": {"depth": 10**7}},
        {"num_local_experts": 10**8},
        {"encoder_layers": 10**6},
        {"max_position_embeddings": 10**15},
    ],
)
def test_numbers_of_modules_beyond_any_checkpoint(model: Path, settings: dict[str, object]) -> None:
    edit_config(model, **settings)
    with pytest.raises(CalibrantError, match=r"config\.json: .* more than a checkpoint"):
        ModelFolder(model)


@pytest.mark.parametrize("settings", [{"text_config": {"vocab_size": 1}}, {"vocab_size": -3}, {"hidden_size": 0}])
def test_text_models_without_sizes(model: Path, settings: dict[str, object]) -> None:
    edit_config(model, **settings)
    for use in (compress, lambda path: cb.evaluate(path, text=cb.Corpus(["many words " * 50]), length=CONTEXT)):
        with pytest.raises(CalibrantError, match=r"config\.json|vocabulary"):
            use(model)


@pytest.mark.parametrize("settings", [{"return_dict": False}, {"output_hidden_states": True}])
def test_settings_of_what_modules_return_change_nothing(model: Path, settings: dict[str, object]) -> None:
    edit_config(model, **settings)
    output = compress(model)
    found = cb.evaluate(output, against=model, text=cb.Corpus(["many words " * 50]), length=16, limit=2)
    assert found.divergence is not None
    assert found.divergence.kl_mean < 0.01


@pytest.mark.parametrize("shape", [[0, 2**63 - 1], [2**41], [2**62, 4], [-1, 64], ["64"]])
def test_shapes_that_nothing_can_hold(model: Path, shape: list[object]) -> None:
    header = {"model.norm.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}
    text = json.dumps(header).encode()
    (model / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(CalibrantError, match=r"model\.safetensors: "):
        ModelFolder(model)


@pytest.mark.parametrize(
    "changes",
    [
        {"rms_norm_eps": math.nan},
        {"rope_parameters": {"rope_type": "default", "rope_theta": math.nan}},
        {"initializer_range": math.nan},
    ],
)
@pytest.mark.parametrize("recipe", ["rtn-w8a16", "wanda-50"])
def test_nan_in_the_configuration_is_refused(model: Path, changes: dict[str, object], recipe: str) -> None:
    edit_config(model, **changes)
    with pytest.raises(CalibrantError, match=rf"config\.json: .*{next(iter(changes))}"):
        compress(model, recipe, calibration=random_set())


@pytest.mark.parametrize("which", [lambda name: True, lambda name: name == f"{UP}.weight", lambda name: "norm" in name])
def test_float64_is_compressed_as_the_loader_reads_it(model: Path, which: Callable[[str], bool]) -> None:
    edit(model, lambda t: t.update({name: tensor.double() for name, tensor in t.items() if which(name)}))
    edit_config(model, dtype="float64")
    assert_same_model(compress(model, "gptq-w8a16", calibration=random_set()), model)


@pytest.mark.parametrize("keep", ["lowest", "middle", "below"])
def test_a_damaged_model_selects_nothing(model: Path, keep: str) -> None:
    edit(model, lambda t: t[f"{LAYER}input_layernorm.weight"].fill_(torch.nan))
    text = model.parent / "text.txt"
    text.write_text("a b c " * 800)
    with pytest.raises(CalibrantError, match="not finite"):
        cb.select(text, tokenizer=model, strategy="perplexity", keep=keep, samples=2, length=16, dtype="float32")


def test_a_damaged_model_has_no_importance(model: Path) -> None:
    edit(model, lambda t: t[f"{LAYER}input_layernorm.weight"].fill_(torch.nan))
    with pytest.raises(CalibrantError, match="q_proj: its inputs contain values that are not finite"):
        cb.write_importance_matrix(model, calibration=random_set(), output=model.parent / "m.gguf")


def test_a_set_needs_no_tokenizer(model: Path) -> None:
    """Token ids are all that a run takes from a set; where there is a tokenizer, it must be the set's."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (model / name).unlink(missing_ok=True)
    assert_same_model(compress(model, "gptq-w8a16", calibration=random_set()), model)
