"""2SSP: the counts of its rule, the neurons and attentions that whole-model references choose, the same function."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import calibrant as cb
from calibrant import prepare
from calibrant.engine.two_stage_pruning import removals
from calibrant.errors import CalibrantError
from calibrant.recipes.recipe import Recipe
from tests.conftest import random_set


def recipe(share: str, **fields: object) -> Recipe:
    scheme = {"sparsity": share}
    return Recipe.model_validate(
        {"name": "r", "description": "d", "method": {"name": "2ssp"}, "scheme": scheme, **fields}
    )


def test_the_rule_for_a_model_like_llama_2_7b() -> None:
    """32 blocks, four attention matrices of 4096 x 4096, three of 4096 x 11008: at a quarter, 5 attentions go."""
    attention, mlp = 4 * 4096**2, 3 * 4096 * 11008
    total = 32 * (attention + mlp + 2 * 4096)
    count, share = removals(32, attention, mlp, total, 0.25)
    assert count == round(32 * 0.25 ** (mlp / attention / 1.5)) == 5
    assert 32 * share * mlp + count * attention == pytest.approx(0.25 * total, rel=1e-6)


def test_shares_that_cannot_be_reached_are_refused() -> None:
    with pytest.raises(ValueError, match="more than all MLPs"):
        removals(4, 1000, 4000, 4 * 6000, 0.9)


def pruned(model: Path, output: Path, share: str) -> dict:
    cb.compress(model, output=output, recipe=recipe(share), calibration=random_set(model), dtype="float32")
    structure: dict = json.loads((output / "calibrant.json").read_text())["structure"]
    return structure


def original(folder: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    ("architecture", "down", "attention_out"),
    [
        ("llama", "model.layers.{}.mlp.down_proj", "model.layers.{}.self_attn.o_proj"),
        ("qwen2", "model.layers.{}.mlp.down_proj", "model.layers.{}.self_attn.o_proj"),
        ("gemma3", "model.layers.{}.mlp.down_proj", "model.layers.{}.self_attn.o_proj"),
        ("opt", "model.decoder.layers.{}.fc2", "model.decoder.layers.{}.self_attn.out_proj"),
        ("gpt2", "transformer.h.{}.mlp.c_proj", "transformer.h.{}.attn.c_proj"),
    ],
)
def test_it_is_the_original_with_neurons_and_attentions_silenced(
    model_folder, tmp_path: Path, architecture: str, down: str, attention_out: str
) -> None:
    model = model_folder(architecture)
    structure = pruned(model, tmp_path / "out", "0.5")
    reference, calibration = original(model), random_set(model)
    inputs: dict[int, torch.Tensor] = {}
    for block in range(2):

        def note(_: torch.nn.Module, args: tuple[torch.Tensor, ...], block: int = block) -> None:
            inputs[block] = args[0].reshape(*calibration.tokens.shape, -1)

        reference.get_submodule(down.format(block)).register_forward_pre_hook(note)
    with torch.no_grad():
        reference(calibration.tokens.long())
    kept = {}
    for block, values in inputs.items():
        norms = values.double().norm(dim=1).sum(0)
        kept[block] = norms.argsort(descending=True)[: structure["neurons"]]

    reference = original(model)
    for block in range(2):

        def silence(_: torch.nn.Module, args: tuple[torch.Tensor, ...], block: int = block) -> tuple[torch.Tensor]:
            alive = torch.zeros(args[0].shape[-1])
            alive[kept[block]] = 1
            return (args[0] * alive,)

        reference.get_submodule(down.format(block)).register_forward_pre_hook(silence)

    def without(blocks: list[int]) -> transformers.PreTrainedModel:
        for block in blocks:
            module = reference.get_submodule(attention_out.format(block))
            for parameter in module.parameters():
                parameter.data = torch.zeros_like(parameter)
        return reference

    tokens = random_set(seed=9).tokens.long()
    expected = without(structure["attention_removed"])
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(found(tokens).logits, expected(tokens).logits, rtol=1e-4, atol=1e-4)


def test_the_attention_that_costs_least_goes(llama: Path, tmp_path: Path) -> None:
    structure = pruned(llama, tmp_path / "out", "0.5")
    assert len(structure["attention_removed"]) == 1
    tokens = random_set(llama).tokens.long()[structure["row"]][None]
    narrow = tmp_path / "out"
    tensors, source = load_file(narrow / "model.safetensors"), load_file(llama / "model.safetensors")
    losses = {}
    for block in range(2):
        loaded = original(narrow)
        for other in range(2):
            name = f"model.layers.{other}.self_attn.o_proj"
            weight = source[f"{name}.weight"]
            loaded.get_submodule(name).weight.data = torch.zeros_like(weight) if other == block else weight
        with torch.no_grad():
            losses[block] = float(loaded(tokens, labels=tokens).loss)
    assert structure["attention_removed"] == [min(losses, key=losses.__getitem__)]
    assert structure["losses"][1] == pytest.approx(min(losses.values()), rel=1e-5)
    assert not tensors[f"model.layers.{structure['attention_removed'][0]}.self_attn.o_proj.weight"].any()


def test_the_share_is_reached_and_kept_weights_are_the_originals(llama: Path, tmp_path: Path) -> None:
    structure = pruned(llama, tmp_path / "out", "0.25")
    before, after = load_file(llama / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    blocks = sum(tensor.numel() for name, tensor in before.items() if "layers" in name)
    gone = sum(before[name].numel() - tensor.numel() for name, tensor in after.items())
    assert gone / blocks == pytest.approx(0.25, abs=0.01)
    assert structure["share"] == pytest.approx(gone / blocks)
    name = "model.layers.0.mlp.up_proj.weight"
    rows = [int((before[name] == row).all(1).nonzero()[0, 0]) for row in after[name]]
    assert rows == sorted(rows)
    assert torch.equal(after[name], before[name][rows])
    assert torch.equal(
        after["model.layers.0.mlp.down_proj.weight"], before["model.layers.0.mlp.down_proj.weight"][:, rows]
    )


def test_masked_tokens_change_nothing(llama: Path, tmp_path: Path) -> None:
    calibration = random_set(llama)
    padded = torch.cat([calibration.tokens, torch.full((8, 8), 5, dtype=calibration.tokens.dtype)], 1)
    mask = torch.cat([calibration.mask, torch.zeros(8, 8, dtype=torch.bool)], 1)
    longer = cb.CalibrationSet.build(padded, mask, calibration.manifest.model_copy(update={"length": 40}))
    for name, one in (("plain", calibration), ("padded", longer)):
        cb.compress(llama, output=tmp_path / name, recipe=recipe("0.25"), calibration=one, dtype="float32")
    plain, with_padding = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "padded"))
    assert all(torch.equal(plain[name], with_padding[name]) for name in plain)


def test_attention_is_judged_on_the_row_with_most_counted_tokens(llama: Path, tmp_path: Path) -> None:
    calibration = random_set(llama, masked=10)
    mask = calibration.mask.clone()
    mask[3, 5:] = True
    fullest = cb.CalibrationSet.build(calibration.tokens, mask, calibration.manifest)
    cb.compress(llama, output=tmp_path / "out", recipe=recipe("0.5"), calibration=fullest, dtype="float32")
    assert json.loads((tmp_path / "out" / "calibrant.json").read_text())["structure"]["row"] == 3


@pytest.mark.parametrize("architecture", ["mixtral", "falcon", "phi"])
def test_blocks_of_another_kind_are_refused(model_folder, tmp_path: Path, architecture: str) -> None:
    model = model_folder(architecture)
    with pytest.raises(CalibrantError, match=r"2ssp cannot (prune|write)|names no width"):
        prepare(model, output=tmp_path / "out", recipe=recipe("0.25"))  # before data are asked for
    assert not (tmp_path / "out").exists()


def test_patterns_and_ignore_lists_do_not_apply() -> None:
    with pytest.raises(ValueError, match="no pattern"):
        recipe("2:4")
    with pytest.raises(ValueError, match="no ignore"):
        recipe("0.25", ignore=["lm_head"])


def test_it_leaves_neurons_and_takes_no_attention_twice(llama: Path, tmp_path: Path) -> None:
    attention, mlp = 2 * 64 * 64 + 2 * 32 * 64, 3 * 64 * 96
    for thousandths in range(500, 1000):
        try:
            of_mlp = removals(2, attention, mlp, 2 * (attention + mlp + 2 * 64), thousandths / 1000)[1]
        except ValueError:
            continue
        if round(96 * (1 - of_mlp)) == 0:
            break
    with pytest.raises(CalibrantError, match="leaves no neuron"):
        pruned(llama, tmp_path / "none", f"0.{thousandths}")
    pruned(llama, tmp_path / "out", "0.5")
    with pytest.raises(CalibrantError, match="its attention is left out already"):
        pruned(tmp_path / "out", tmp_path / "again", "0.25")
