"""Distillation: what learns and what stays, in every format, and that the loaded model is nearer to the original."""

import gc
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import calibrant as cb
from calibrant.errors import CalibrantError
from calibrant.formats.quantized import Codes
from calibrant.formats.safetensors_file import replace_tensors
from calibrant.modeling.checkpoint import ModelFolder
from calibrant.modeling.losses import divergences
from calibrant.modeling.model_head import ModelHead
from calibrant.modeling.token_rows import TokenRows
from calibrant.modeling.whole_model import load_whole, torch_dtype
from calibrant.progress import NoProgress
from calibrant.quantization.grids import GridSpec
from calibrant.training.solved_model import SolvedModel
from calibrant.training.student import Student
from calibrant.training.teacher import RememberingTeacher, WholeTeacher, remembered
from tests.checkpoints import loaded_divergence
from tests.conftest import random_set, write_model

PRUNED: dict[str, Any] = {"method": {"name": "sparsegpt"}, "scheme": {"sparsity": "0.6"}}
QUANTIZED: dict[str, Any] = {
    "method": {"name": "gptq"},
    "scheme": {"weights": {"bits": 2, "group_size": 32, "range_search": "clip", "signed_scales": True}},
}
ROUNDED: dict[str, Any] = {"method": {"name": "rtn"}, "scheme": {"weights": {"bits": 2}}}
DISTILLED = {"distillation": {"epochs": 4, "batch_size": 8}}


def recipe(said: dict[str, Any], **more: Any) -> cb.Recipe:
    return cb.Recipe.model_validate({"name": "x", "description": "x", **said, **more})


def outputs(model: Path, folder: Path, said: dict[str, Any], **options: Any) -> tuple[Path, Path]:
    """One without distillation and one with."""
    plain, distilled = folder / "plain", folder / "distilled"
    for output, more in ((plain, {}), (distilled, DISTILLED)):
        chosen = {"calibration": random_set(model, samples=64), "dtype": "float32", **options}
        cb.compress(model, output=output, recipe=recipe(said, **more), **chosen)
    return plain, distilled


def tensors(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "model.safetensors")


def nearer(model: Path, plain: Path, distilled: Path) -> bool:
    rows = random_set(model, samples=64, seed=1).tokens.long()
    return loaded_divergence(distilled, model, rows) < 0.99 * loaded_divergence(plain, model, rows)


@pytest.mark.parametrize(
    "said",
    [PRUNED, QUANTIZED, ROUNDED],
    ids=["pruned", "quantized", "without data"],
)
def test_the_loaded_model_comes_nearer_to_the_original(llama: Path, tmp_path: Path, said: dict[str, Any]) -> None:
    assert nearer(llama, *outputs(llama, tmp_path, said))


@pytest.mark.parametrize("checkpoint_format", ["compressed-tensors", "gptq", "awq"])
def test_codes_stay_and_scales_learn(llama: Path, tmp_path: Path, checkpoint_format: str) -> None:
    said = {"method": {"name": "gptq"}, "scheme": {"weights": {"bits": 4, "group_size": 32}}}
    plain, distilled = outputs(llama, tmp_path, said, checkpoint_format=checkpoint_format)
    before, after = tensors(plain), tensors(distilled)
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert before.keys() == after.keys()
    assert changed == {name for name in after if name.endswith(("weight_scale", "scales"))}
    assert len(changed) == 14
    assert all(torch.equal(before[name].sign(), after[name].sign()) for name in changed)


def test_zeros_stay_and_kept_weights_learn(llama: Path, tmp_path: Path) -> None:
    plain, distilled = outputs(llama, tmp_path, {**PRUNED, "ignore": ["down_proj"]})
    before, after = tensors(plain), tensors(distilled)
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {name for name in after if "layers" in name and "proj" in name and "down_proj" not in name}
    for name in changed:
        assert torch.equal(before[name] == 0, after[name] == 0), name


@pytest.mark.parametrize("said", [PRUNED, QUANTIZED], ids=["pruned", "quantized"])
def test_the_recorded_loss_is_that_of_the_loaded_model(tmp_path: Path, said: dict[str, Any]) -> None:
    model = write_model(tmp_path / "model", "llama", torch.bfloat16)
    data = random_set(model, samples=64)
    plain, distilled = outputs(model, tmp_path, said, calibration=data)
    record = json.loads((distilled / "calibrant.json").read_text())["training"]
    held_out = data.tokens[-8:].long()
    for output, step in ((plain, "0"), (distilled, str(record["best"]))):
        assert loaded_divergence(output, model, held_out) == pytest.approx(record["held_out"][step], rel=1e-3)
    assert record["best"] > 0


@pytest.mark.parametrize(
    "said",
    [
        {"method": {"name": "gptq"}, "scheme": {"weights": {"bits": 4}}, "budget": {"choices": [2, 4], "average": 3}},
        {"method": {"name": "gptq"}, "scheme": {"weights": {"bits": 2, "group_size": 32}, "lm_head": {}}},
        {"method": {"name": "gptq"}, "scheme": {"weights": {"bits": 2, "group_size": 32, "symmetric": False}}},
        {"method": {"name": "sparsegpt"}, "scheme": {"sparsity": "0.5"}, "budget": {"choices": [0, 0.7]}},
    ],
    ids=["bits by layer", "packed head", "zero points", "zeros by layer"],
)
def test_other_schemes(llama: Path, tmp_path: Path, said: dict[str, Any]) -> None:
    plain, distilled = outputs(llama, tmp_path, said)
    assert nearer(llama, plain, distilled)
    before, after = tensors(plain), tensors(distilled)
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed
    if "sparsity" in said["scheme"]:  # layers without zeros stay
        assert changed == {name for name in before if "proj" in name and bool((before[name] == 0).any())}


@pytest.mark.parametrize("said", [PRUNED, QUANTIZED], ids=["pruned", "quantized"])
def test_tensors_stored_without_the_models_prefix(llama: Path, tmp_path: Path, said: dict[str, Any]) -> None:
    model = tmp_path / "model"
    shutil.copytree(llama, model)
    (file,) = model.glob("*.safetensors")
    save_file({name.removeprefix("model."): value for name, value in load_file(file).items()}, file, {"format": "pt"})
    assert nearer(model, *outputs(model, tmp_path, said))


def test_masked_tokens_do_not_count(llama: Path, tmp_path: Path) -> None:
    data = random_set(llama, samples=64, masked=4)
    plain, distilled = outputs(llama, tmp_path, ROUNDED, calibration=data)
    ids, counted = data.tokens[-8:].long(), data.mask[-8:]
    original, rounded = (
        load_whole(ModelFolder(path, allow_quantized=True), "cpu", "float32") for path in (llama, plain)
    )
    with torch.no_grad():
        each = divergences(original(ids).logits, rounded(ids).logits)
    recorded = json.loads((distilled / "calibrant.json").read_text())["training"]["held_out"]["0"]
    assert recorded == pytest.approx(float(each[counted].mean()), rel=1e-4)
    assert recorded != pytest.approx(float(each.mean()), rel=1e-3)


@pytest.mark.parametrize("said", [PRUNED, QUANTIZED], ids=["pruned", "quantized"])
def test_several_files_and_a_failure_between_them(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: dict[str, Any]
) -> None:
    """Shards are the journal's parts under other names: a run that goes on needs them as they were."""
    one = outputs(llama, tmp_path / "one", said)[1]
    monkeypatch.setattr("calibrant.formats.shards.ShardWriter.__init__.__defaults__", (1000,))
    replaced: list[Path] = []

    def fails(changed: dict[str, torch.Tensor], file: Path) -> None:
        if replaced:
            raise OSError("no space left on device")
        replace_tensors(changed, file)
        replaced.append(file)

    chosen = {"recipe": recipe(said, **DISTILLED), "calibration": random_set(llama, samples=64), "dtype": "float32"}
    with monkeypatch.context() as broken:
        broken.setattr("calibrant.engine.checkpoint_writer.replace_tensors", fails)
        with pytest.raises(CalibrantError, match="no space left"):
            cb.compress(llama, output=tmp_path / "several", **chosen)
    assert replaced
    report = cb.compress(llama, output=tmp_path / "several", **chosen)
    assert report.layers
    several = [*(tmp_path / "several").glob("*.safetensors")]
    found = {name: value for file in several for name, value in load_file(file).items()}
    assert len(several) > 2
    assert found.keys() == tensors(one).keys()
    assert all(torch.equal(found[name], value) for name, value in tensors(one).items())


@pytest.mark.parametrize("name", ["gpt2", "opt", "qwen3", "gemma3"])
def test_other_architectures(model_folder: Any, tmp_path: Path, name: str) -> None:
    model = model_folder(name)
    assert nearer(model, *outputs(model, tmp_path, PRUNED))


def test_classifiers_learn_their_classes(model_folder: Any, tmp_path: Path) -> None:
    report = cb.compress(
        model_folder("bert"), output=tmp_path / "out", recipe=recipe(PRUNED, **DISTILLED), dtype="float32",
        calibration=random_set(model_folder("bert"), samples=64), allow_encoder=True,
    )  # fmt: skip
    assert any(note.startswith("trained for") for note in report.notes)


def test_the_seed_of_the_run_orders_the_rows(llama: Path, tmp_path: Path) -> None:
    data, found = random_set(llama, samples=64), []
    for output, more in (("a", {"seed": 1}), ("b", {"seed": 2}), ("c", {"seed": 1})):
        said = recipe(QUANTIZED, distillation={"epochs": 1})
        cb.compress(llama, output=tmp_path / output, recipe=said, calibration=data, dtype="float32", **more)
        found.append((tmp_path / output / "model.safetensors").read_bytes())
    assert found[0] == found[2] != found[1]


def test_bfloat16_products(llama: Path, tmp_path: Path) -> None:
    assert nearer(llama, *outputs(llama, tmp_path, QUANTIZED, dtype="bfloat16"))


def test_after_reconstruction_and_transforms(llama: Path, tmp_path: Path) -> None:
    said = {**QUANTIZED, "drift_correction": 0.5, "reconstruction": {}, "transforms": [{"name": "awq"}]}
    assert nearer(llama, *outputs(llama, tmp_path, said))


@pytest.mark.parametrize(("rows", "batch_size", "epochs", "steps"), [(4, 64, 2, 2), (16, 4, 1, 4), (16, 3, 2, 10)])
def test_steps_of_an_epoch(llama: Path, tmp_path: Path, rows: int, batch_size: int, epochs: int, steps: int) -> None:
    """An eighth of the rows is held out, one at least."""
    said = recipe(ROUNDED, distillation={"batch_size": batch_size, "epochs": epochs})
    cb.compress(llama, output=tmp_path / "out", recipe=said, calibration=random_set(llama, samples=rows))
    assert json.loads((tmp_path / "out" / "calibrant.json").read_text())["training"]["steps"] == steps


@pytest.mark.parametrize(
    "said",
    [
        {"method": {"name": "2ssp"}, "scheme": {"sparsity": "0.25"}},
        {"method": {"name": "adpq"}, "scheme": {"weights": {"bits": 4, "group_size": 32}}},
        {"method": {"name": "gptq"}, "scheme": {"weights": {"bits": 8}, "activations": {"dynamic": True}}},
        {"method": {"name": "gptq"}, "scheme": {"weights": {"type": "fp8"}}},
        {"method": {"name": "qat"}, "scheme": {"weights": {"bits": 4}}},
        {"method": {"name": "gptq"}, "scheme": {"weights": {"bits": 4}, "kv_cache": {"type": "fp8"}}},
    ],
    ids=["2ssp", "adpq", "activations", "fp8", "qat", "kv_cache"],
)
def test_what_leaves_nothing_to_learn_is_refused(said: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="distillation"):
        recipe(said, distillation={})


def test_scales_that_are_not_stored_are_refused(model_folder: Any, tmp_path: Path) -> None:
    model = model_folder("gpt2")
    with pytest.raises(CalibrantError, match="stored dense, without scales that distillation could train"):
        cb.compress(
            model, output=tmp_path / "out", recipe=recipe(QUANTIZED, distillation={}), calibration=random_set(model)
        )


def test_fused_experts_are_refused(model_folder: Any, tmp_path: Path) -> None:
    model = model_folder("mixtral")
    with pytest.raises(CalibrantError, match="take a recipe without distillation"):
        cb.compress(
            model, output=tmp_path / "out", recipe=recipe(QUANTIZED, distillation={}), calibration=random_set(model)
        )


def test_a_model_beyond_memory_is_refused_before_anything_is_written(llama: Path, tmp_path: Path) -> None:
    said, data = recipe(QUANTIZED, distillation={}), random_set(llama)

    def prepared(memory: str) -> cb.PreparedRun:
        return cb.prepare(llama, output=tmp_path / "out", recipe=said, calibration=data, memory=memory)

    needed = prepared("100GB").estimate().memory_bytes
    for act in (prepared(f"{int(needed * 0.9)}").run, prepared(f"{int(needed * 0.9)}").memory_notes):
        with pytest.raises(CalibrantError, match=r"about .* GB, and .* GB may be used; take a recipe without"):
            act()
    assert not list(tmp_path.iterdir())
    assert prepared(f"{int(needed * 1.1)}").run().layers


@pytest.mark.parametrize(
    ("rows", "masked", "message"), [(1, 0, "two rows or more"), (8, 32, "has none")], ids=["one row", "all masked"]
)
def test_sets_too_small_are_refused_before_anything_is_written(
    llama: Path, tmp_path: Path, rows: int, masked: int, message: str
) -> None:
    data = random_set(llama, samples=rows, masked=masked)
    with pytest.raises(CalibrantError, match=message):
        cb.compress(llama, output=tmp_path / "out", recipe=recipe(ROUNDED, distillation={}), calibration=data)
    assert not list(tmp_path.iterdir())


def test_models_without_a_head_are_refused_before_anything_is_written(llama: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    transformers.AutoModel.from_pretrained(llama).save_pretrained(model)
    data = random_set(samples=8)
    with pytest.raises(CalibrantError, match="gives no logits"):
        cb.compress(
            model,
            output=tmp_path / "out",
            recipe=recipe(ROUNDED, distillation={}),
            calibration=data,
            allow_encoder=True,
        )
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_training_that_diverges_keeps_the_values_before(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out, count = Student.held_out, [0]

    def diverges(self: Student) -> float:
        count[0] += 1
        return held_out(self) if count[0] == 1 else float("nan")

    monkeypatch.setattr(Student, "held_out", diverges)
    plain, distilled = outputs(llama, tmp_path, QUANTIZED)
    record = json.loads((distilled / "calibrant.json").read_text())
    assert any("diverged by step" in note for note in record["notes"])
    assert [*record["training"]["held_out"]] == ["0"]
    assert (plain / "model.safetensors").read_bytes() == (distilled / "model.safetensors").read_bytes()


def test_untrained_values_are_kept_where_training_does_not_help(llama: Path, tmp_path: Path) -> None:
    """At a rate far too high the held-out loss only rises."""
    said = recipe(QUANTIZED, distillation={"learning_rate": 10.0, "epochs": 1})
    data = random_set(llama, samples=64)
    cb.compress(llama, output=tmp_path / "plain", recipe=recipe(QUANTIZED), calibration=data, dtype="float32")
    report = cb.compress(llama, output=tmp_path / "out", recipe=said, calibration=data, dtype="float32")
    assert any("training did not help" in note for note in report.notes)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "plain" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_a_teacher_without_blocks_gives_the_logits_of_the_whole_one(model_folder: Any, name: str, dtype: str) -> None:
    """Gemma 2 caps its logits."""
    folder, computed = ModelFolder(model_folder(name)), torch_dtype(dtype, torch.device("cpu"))
    model = load_whole(folder, "cpu", "float32")
    rows = TokenRows(*(values.long() for values in random_set(samples=3).rows))
    found = remembered(model, folder, [rows], computed, NoProgress())
    assert isinstance(found, RememberingTeacher)
    with torch.no_grad():
        expected = WholeTeacher(model, computed).logits({"input_ids": rows.ids})
        assert found.logits({"input_ids": rows.ids}) == pytest.approx(expected, abs=1e-4)


def test_the_original_leaves_memory_once_its_states_are_known(llama: Path) -> None:
    """At once: the student takes its place before Python looks for cycles of references."""
    folder, model = ModelFolder(llama), load_whole(ModelFolder(llama), "cpu", "float32")
    weights = [weakref.ref(model.lm_head.weight), weakref.ref(model.model.layers[0].mlp.up_proj.weight)]
    rows = TokenRows(*(values.long() for values in random_set(samples=3).rows))
    gc.collect()
    gc.disable()
    try:
        found = remembered(model, folder, [rows], torch.float32, NoProgress())
        del model
        assert isinstance(found, RememberingTeacher)
        assert [weight() for weight in weights] == [None, None]
    finally:
        gc.enable()


def test_a_head_that_reads_what_is_not_loaded_is_not_used(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> torch.Tensor:
        raise RuntimeError("Tensor on device meta")

    monkeypatch.setattr(ModelHead, "logits", fails)
    rows = TokenRows(*(values.long() for values in random_set(samples=3).rows))
    model = load_whole(ModelFolder(llama), "cpu", "float32")
    found = remembered(model, ModelFolder(llama), [rows], torch.float32, NoProgress())
    assert isinstance(found, WholeTeacher)


def test_what_codes_replace_leaves_memory(llama: Path, tmp_path: Path) -> None:
    plain, _ = outputs(llama, tmp_path, ROUNDED)
    model = load_whole(ModelFolder(plain, allow_quantized=True), "cpu", "float32")
    name = "model.layers.0.mlp.up_proj"
    weight = weakref.ref(model.get_submodule(name).weight)
    values = model.get_submodule(name).weight.detach().clone()
    scale = tensors(plain)[f"{name}.weight_scale"]
    numbers = (values.unflatten(1, (scale.shape[1], -1)) / scale[..., None].float()).round().flatten(1)
    codes = Codes(numbers.to(torch.int8), scale, torch.zeros_like(scale, dtype=torch.int8))
    spec = GridSpec(2, True, values.shape[1] // scale.shape[1], scale.dtype)
    solved = SolvedModel(model, {name: codes}, {name: spec}, {}, torch.float32)
    assert weight() is None
    assert torch.allclose(solved.model.get_submodule(name).weight, values, atol=1e-6)


def test_a_classifier_runs_each_time(model_folder: Any) -> None:
    folder = ModelFolder(model_folder("bert"), allow_encoder=True)
    rows = TokenRows(*(values.long() for values in random_set(samples=3).rows))
    found = remembered(load_whole(folder, "cpu", "float32"), folder, [rows], torch.float32, NoProgress())
    assert isinstance(found, WholeTeacher)
