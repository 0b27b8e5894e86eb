"""Int8 inputs of models whose layers no quantized format supports: stored beside dense weights, applied on loading."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import calibrant as cb
from calibrant.engine import checkpoint_writer
from calibrant.errors import CalibrantError
from calibrant.formats.input_rounding import INPUT_ROUNDING, read_input_rounding, write_input_rounding
from calibrant.modeling.checkpoint import ModelFolder
from calibrant.modeling.whole_model import load_whole
from calibrant.recipes.recipe import Recipe
from tests.checkpoints import loaded_divergence
from tests.conftest import random_set

STATIC = {"dynamic": False}
DYNAMIC = {"dynamic": True}
# Damaged files, and the message about each.
OTHERS = (
    ('{"bits": 8, "linears": []}', "damaged"),
    ('{"bits": 4, "linears": {}}', "bits are 4"),
    ('{"bits": 8, "linears": {"no": {"dynamic": true}}}', "no layer"),
    ('{"bits": 8, "linears": {"a": null}}', "damaged"),
    ('{"bits": 8, "linears": {"a": {"scale": 0.0, "zero_point": 0}}}', "scale 0.0"),
    ('{"bits": 8, "linears": {"a": {"scale": NaN, "zero_point": 0}}}', "scale nan"),
    ('{"bits": 8, "linears": {"a": {"scale": 1.0, "zero_point": 128}}}', "zero point 128"),
)


def w8a8(activations: dict[str, Any], **others: Any) -> Recipe:
    scheme = {"weights": {"bits": 8}, "activations": activations}
    return Recipe.model_validate(
        {"name": "r", "description": "d", "method": {"name": "rtn"}, "scheme": scheme, **others}
    )


def by_hand(inputs: torch.Tensor, grid: tuple[float, int] | None) -> torch.Tensor:
    """The inputs rounded to their grid, in float64."""
    exact = inputs.double()
    if grid is None:
        scale, zero_point = exact.abs().amax(-1, keepdim=True) / 127.5, 0
    else:
        scale, zero_point = torch.tensor(grid[0], dtype=torch.float64), grid[1]
    return (((exact / scale).round() + zero_point).clamp(-128, 127) - zero_point) * scale


@pytest.mark.parametrize("activations", [STATIC, DYNAMIC])
@pytest.mark.parametrize("architecture", ["gpt2", "falcon"])
def test_inputs_are_rounded_as_described(
    model_folder, tmp_path: Path, architecture: str, activations: dict[str, Any]
) -> None:
    model, output = model_folder(architecture), tmp_path / "out"
    report = cb.compress(model, output=output, recipe=w8a8(activations), calibration=random_set(model))
    assert any(INPUT_ROUNDING in note for note in report.notes)
    grids = read_input_rounding(output)
    assert set(grids) == {layer.name for layer in report.layers}
    assert all((grid is None) == (activations is DYNAMIC) for grid in grids.values())
    ours = load_whole(ModelFolder(output, allow_quantized=True), "cpu", "float32")
    plain = transformers.AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    ids = random_set(model, samples=2).tokens.long()
    given: dict[str, torch.Tensor] = {}
    read: dict[str, torch.Tensor] = {}
    for name in grids:
        # Inputs before and after rounding.
        module = ours.get_submodule(name)
        module.register_forward_pre_hook(lambda _, args, n=name: given.update({n: args[0]}), prepend=True)
        module.register_forward_hook(lambda _, args, __, n=name: read.update({n: args[0]}))
    with torch.no_grad():
        rounded, unrounded = ours(input_ids=ids).logits, plain(input_ids=ids).logits
    for name, grid in grids.items():
        apart = (read[name].double() - by_hand(given[name], grid)).abs()
        # float32 may round a few values near one half by one step the other way.
        assert float((apart > 1e-5).double().mean()) < 0.01
        assert float((apart / given[name].abs().amax()).max()) < 1 / 32
        assert not torch.equal(read[name], given[name])
    assert not torch.equal(rounded, unrounded)
    again = tmp_path / "again"
    cb.compress(model, output=again, recipe=w8a8(activations), calibration=random_set(model))
    assert (again / INPUT_ROUNDING).read_bytes() == (output / INPUT_ROUNDING).read_bytes()


@pytest.mark.parametrize("architecture", ["gpt2", "falcon"])
@pytest.mark.parametrize("activations", [STATIC, DYNAMIC])
def test_evaluation_sees_what_training_saw(
    model_folder, tmp_path: Path, activations: dict[str, Any], architecture: str
) -> None:
    model = model_folder(architecture)
    data = random_set(model, samples=8, length=16)
    training = {"name": "qat", "steps": 4, "batch_size": 4, "length": 16, "eval_steps": 2, "learning_rate": 1e-3}
    output = tmp_path / "out"
    cb.compress(model, output=output, recipe=w8a8(activations, method=training), calibration=data, dtype="float32")
    found = json.loads((output / "calibrant.json").read_text())["training"]
    divergence = loaded_divergence(output, model, data.tokens[-1:].long())
    assert divergence == pytest.approx(found["held_out"][str(found["best"])], rel=1e-3)


def test_such_a_model_is_not_compressed_again_and_its_file_is_checked(model_folder, tmp_path: Path) -> None:
    gpt2, output = model_folder("gpt2"), tmp_path / "out"
    cb.compress(gpt2, output=output, recipe=w8a8(DYNAMIC), calibration=random_set(gpt2))
    with pytest.raises(CalibrantError, match="quantized already"):
        cb.compress(output, output=tmp_path / "second", recipe=w8a8(DYNAMIC), calibration=random_set(gpt2))
    file = output / INPUT_ROUNDING
    good = file.read_text()
    for text, said in ((good[:50], "damaged"), *OTHERS):
        file.write_text(text)
        with pytest.raises(CalibrantError, match=said):
            load_whole(ModelFolder(output, allow_quantized=True), "cpu", "float32")


def test_fused_experts_do_not_go_with_int8_inputs(model_folder, tmp_path: Path) -> None:
    mixtral = model_folder("mixtral")
    with pytest.raises(CalibrantError, match="fused experts, which quantized activations do not go with"):
        cb.compress(mixtral, output=tmp_path / "out", recipe=w8a8(DYNAMIC), calibration=random_set(mixtral))


@pytest.mark.parametrize("wrong", [{"transformer.h.0.attn.c_attn": None}, {}])
def test_a_file_that_differs_from_the_solution_fails_the_run(
    model_folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: dict[str, None]
) -> None:
    def damaged(folder: Path, grids: object) -> None:
        write_input_rounding(folder, wrong)

    monkeypatch.setattr(checkpoint_writer, "write_input_rounding", damaged)
    gpt2 = model_folder("gpt2")
    with pytest.raises(CalibrantError, match="is not what was solved"):
        cb.compress(gpt2, output=tmp_path / "out", recipe=w8a8(STATIC), calibration=random_set(gpt2))
    assert not (tmp_path / "out").exists()


def test_inputs_of_ignored_layers_are_not_rounded(model_folder, tmp_path: Path) -> None:
    gpt2, output = model_folder("gpt2"), tmp_path / "out"
    chosen = w8a8(DYNAMIC, ignore=["c_fc"])
    cb.compress(gpt2, output=output, recipe=chosen, calibration=random_set(gpt2))
    grids = read_input_rounding(output)
    assert len(grids) == 6
    assert not any("c_fc" in name for name in grids)
