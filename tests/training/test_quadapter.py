"""Quadapter's first phase on small models whose outlier channels are known, since they were planted."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import calibrant as cb
from calibrant.calibration.calibration_set import CalibrationSet
from calibrant.errors import CalibrantError
from calibrant.formats.compressed_tensors import PackQuantized
from calibrant.formats.quantized import Layout
from calibrant.journal import Journal
from calibrant.modeling.checkpoint import ModelFolder
from calibrant.modeling.find_blocks import find_blocks
from calibrant.modeling.lazy_model import LazyModel
from calibrant.modeling.module_call import ModuleCall
from calibrant.modeling.trainable_block import TrainableBlock
from calibrant.modeling.whole_model import load_whole
from calibrant.progress import NoProgress
from calibrant.recipes.make_plan import make_plan
from calibrant.recipes.recipe import Recipe
from calibrant.training.quadapter import ScaleFit, learn_scales
from calibrant.training.scaled_model import PlacedPair, ScaledModel
from tests.checkpoints import loaded_divergence
from tests.conftest import random_set, write_model

PLANTED = (3, 17, 40)
FACTOR = 48.0
# Those in front of linears: Llama, Gemma 3, GPT-2, OPT.
NORMS = ("input_layernorm.weight", "ln_1.weight", "ln_2.weight", "layers.0.self_attn_layer_norm.weight")
BEHIND = {"input_layernorm": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]}
BEHIND |= {"post_attention_layernorm": ["mlp.gate_proj", "mlp.up_proj"]}


def recipe(*transforms: dict[str, object], training: dict[str, object] | None = None, **scheme: object) -> Recipe:
    wanted = scheme or {"weights": {"bits": 8}, "activations": {"dynamic": False}}
    return Recipe.model_validate(
        {
            "name": "r",
            "description": "d",
            "transforms": list(transforms),
            "method": training or {"name": "rtn"},
            "scheme": wanted,
        }
    )


@pytest.fixture
def planted(llama: Path, tmp_path: Path) -> Path:
    """The same function as ``llama``, with some channels behind the norms much larger than the others."""
    folder = shutil.copytree(llama, tmp_path / "planted")
    tensors = load_file(folder / "model.safetensors")
    scale = torch.ones(64)
    scale[list(PLANTED)] = FACTOR
    for block in range(2):
        for norm, linears in BEHIND.items():
            tensors[f"model.layers.{block}.{norm}.weight"] *= scale
            for linear in linears:
                tensors[f"model.layers.{block}.{linear}.weight"] /= scale
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def logits(folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        found: torch.Tensor = model(random_set(samples=6, seed=5).tokens.long()).logits
    return found


def error(folder: Path, original: Path) -> float:
    """Squared change of the logits."""
    return float((logits(folder) - logits(original)).square().mean())


def test_planted_outliers_are_found_and_their_harm_is_undone(planted: Path, llama: Path, tmp_path: Path) -> None:
    torch.testing.assert_close(logits(planted), logits(llama), rtol=1e-3, atol=1e-4)
    data = random_set(planted, samples=16)
    for name, transforms in {"rtn": [], "quadapter": [{"name": "quadapter"}]}.items():
        cb.compress(planted, output=tmp_path / name, recipe=recipe(*transforms), calibration=data, dtype="float32")
    cb.compress(llama, output=tmp_path / "clean", recipe=recipe(), calibration=data, dtype="float32")
    harmed, healed, clean = (error(tmp_path / name, llama) for name in ("rtn", "quadapter", "clean"))
    assert harmed - healed >= 0.9 * (harmed - clean)
    before, after = (load_file(path / "model.safetensors") for path in (planted, tmp_path / "quadapter"))
    for block in range(2):
        for norm in BEHIND:
            name = f"model.layers.{block}.{norm}.weight"
            alpha = after[name].float() / before[name].float()
            assert set(alpha.argsort()[: len(PLANTED)].tolist()) == set(PLANTED)
            assert bool((alpha > 0).all())


def test_no_step_to_speak_of_is_round_to_nearest(llama: Path, tmp_path: Path) -> None:
    for name, transforms in {"rtn": [], "still": [{"name": "quadapter", "steps": 1, "learning_rate": 1e-12}]}.items():
        cb.compress(llama, output=tmp_path / name, recipe=recipe(*transforms), calibration=random_set(llama))
    plain, still = (load_file(tmp_path / name / "model.safetensors") for name in ("rtn", "still"))
    assert plain.keys() == still.keys()
    assert all(torch.equal(plain[name], still[name]) for name in plain)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2", "opt"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_architectures_learn_scales_for_weights_too(
    model_folder, tmp_path: Path, architecture: str, dtype: str
) -> None:
    chosen = recipe({"name": "quadapter", "steps": 40}, weights={"bits": 3})
    model = model_folder(architecture)
    cb.compress(model, output=tmp_path / "out", recipe=chosen, calibration=random_set(model), dtype=dtype)
    notes = json.loads((tmp_path / "out" / "calibrant.json").read_text())["notes"]
    assert any("quadapter scales moved:" in note and "nowhere" not in note for note in notes)
    before, after = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "out"))
    norms = [name for name in before if name.endswith(NORMS)]
    assert norms
    assert any(not torch.equal(before[name].float(), after[name].float()) for name in norms)


def test_dynamic_activations_and_one_row_are_enough(planted: Path, tmp_path: Path) -> None:
    dynamic = {"weights": {"bits": 8}, "activations": {"dynamic": True}}
    data = random_set(planted, samples=1)
    for name, transforms in {"rtn": [], "quadapter": [{"name": "quadapter"}]}.items():
        cb.compress(planted, output=tmp_path / name, recipe=recipe(*transforms, **dynamic), calibration=data)
    assert error(tmp_path / "quadapter", planted) < error(tmp_path / "rtn", planted)


def test_the_same_command_gives_the_same_bytes(planted: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        chosen = recipe({"name": "quadapter", "steps": 20})
        cb.compress(planted, output=tmp_path / name, recipe=chosen, calibration=random_set(planted))
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b"))
    assert first == second


@pytest.mark.parametrize("transforms", [[{"name": "quadapter", "steps": 10}], [{"name": "smoothquant"}]])
def test_uncounted_tokens_change_nothing(planted: Path, tmp_path: Path, transforms: list[dict[str, object]]) -> None:
    whole = random_set(planted, samples=9)
    mask = whole.mask.clone()
    mask[:, 24:] = False
    mask[:, :2] = False
    tokens = whole.tokens.clone()
    tokens[:, 24:] = 7
    for name, one in {"a": whole.tokens, "b": tokens}.items():
        data = CalibrationSet.build(one, mask, whole.manifest)
        cb.compress(planted, output=tmp_path / name, recipe=recipe(*transforms), calibration=data)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", ["quadapter", "smoothquant"])
def test_a_model_that_is_not_finite_is_refused(llama: Path, tmp_path: Path, name: str) -> None:
    model = shutil.copytree(llama, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][3] = float("nan")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    chosen = recipe({"name": name}, weights={"bits": 8}, activations={"dynamic": True})
    with pytest.raises(CalibrantError, match=r"model\.layers\.1: .*not finite"):
        cb.compress(model, output=tmp_path / "out", recipe=chosen, calibration=random_set(model))


def test_a_model_without_a_place_for_scales_says_so(model_folder, tmp_path: Path) -> None:
    model = model_folder("olmo2")
    chosen = recipe({"name": "quadapter", "steps": 2}, weights={"bits": 4})
    report = cb.compress(model, output=tmp_path / "out", recipe=chosen, calibration=random_set(model))
    assert any("nowhere" in note for note in report.notes)


def test_fused_experts_are_refused(model_folder, tmp_path: Path) -> None:
    model = model_folder("mixtral")
    with pytest.raises(CalibrantError, match="fused experts, which quadapter"):
        cb.compress(
            model,
            output=tmp_path / "out",
            recipe=recipe({"name": "quadapter"}, weights={"bits": 4}),
            calibration=random_set(model),
        )


def test_other_transforms_do_not_go_with_it() -> None:
    with pytest.raises(ValueError, match="leave other transforms out"):
        recipe({"name": "quadapter"}, {"name": "smoothquant"})


SECOND = {"name": "quadapter", "steps": 12, "batch_size": 4, "length": 16, "eval_steps": 4}


def with_other_norms(folder: Path) -> Path:
    """Gains and biases of norms that are not all one and nothing."""
    tensors, draw = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(0)
    for name, value in tensors.items():
        if value.ndim == 1 and ("norm" in name or "ln_" in name):
            tensors[name] = (value + 0.3 * torch.randn(value.shape, generator=draw)).to(value.dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("ignore", [[], ["v_proj|lm_head"]])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2", "opt"])
def test_the_scaled_model_computes_what_is_stored(
    tmp_path: Path, architecture: str, stored: torch.dtype, ignore: list[str]
) -> None:
    """The divergence that the second phase ended with, from the files by another library."""
    model = with_other_norms(write_model(tmp_path / "model", architecture, stored))
    static = {"weights": {"bits": 4}, "activations": {"dynamic": False}}
    training = {**SECOND, "objective": "teacher"}
    data = random_set(model, samples=8, length=16)
    chosen = recipe({"name": "quadapter", "steps": 20}, training=training, **static)
    chosen = chosen.model_copy(update={"ignore": ignore})
    cb.compress(model, output=tmp_path / "out", recipe=chosen, calibration=data, dtype="float32")
    record = json.loads((tmp_path / "out" / "calibrant.json").read_text())["training"]
    assert len(set(record["held_out"].values())) > 1
    found = loaded_divergence(tmp_path / "out", model, data.tokens[-1:].long())
    assert found == pytest.approx(record["held_out"][str(record["best"])], rel=1e-3)


def test_scales_that_move_into_columns_change_nothing_but_the_rounding(llama: Path) -> None:
    """So what the gain and the columns say of a scale cancels: both are seen, with weights so fine and no ranges."""
    learner, places = scaled(llama, 0.06)
    with torch.inference_mode(False), torch.enable_grad():
        original = load_whole(ModelFolder(llama), "cpu", "float32")
        ids = random_set(llama).tokens.long()
        weights = torch.randn(8, 32, 128, generator=torch.Generator().manual_seed(0))
        loss = (learner.model(input_ids=ids).logits * weights).sum()
        logs = learner.groups[0][0]
        found = torch.autograd.grad(loss, logs)
        for norm in (original.get_submodule(f"{place.prefix}.{place.pair.producer.norm}") for place in places):
            norm.weight.requires_grad_(True)
        plain = [original.get_submodule(f"{place.prefix}.{place.pair.producer.norm}").weight for place in places]
        alone = torch.autograd.grad((original(input_ids=ids).logits * weights).sum(), plain)
    assert len(found) == len(alone) == 4
    for both, one, gain in zip(found, alone, plain, strict=True):
        assert float(both.norm()) < 0.1 * float((one * gain.detach()).norm())


@pytest.mark.parametrize("architecture", ["opt", "gpt2"])
def test_the_first_phase_learns_with_what_the_file_can_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    """Of OPT its gains, of GPT-2, which is stored dense, the rounded weights too."""
    seen = []
    changed = TrainableBlock.changed

    def noted(self: TrainableBlock, tensors: dict[str, torch.Tensor], change_input: Any) -> Any:
        seen.extend(value.detach().clone() for name, value in tensors.items() if "norm" in name or "c_" in name)
        return changed(self, tensors, change_input)

    monkeypatch.setattr(TrainableBlock, "changed", noted)
    model = with_other_norms(write_model(tmp_path / "model", architecture, torch.bfloat16))
    chosen = recipe({"name": "quadapter", "steps": 5})
    cb.compress(model, output=tmp_path / "out", recipe=chosen, calibration=random_set(model), dtype="float32")
    assert len({float(value.sum()) for value in seen}) > 4
    assert all(torch.equal(value, value.bfloat16().float()) for value in seen)


def scaled(folder: Path, learning_rate: float) -> tuple[ScaledModel, list[PlacedPair]]:
    """What the second phase trains, with a step's scales; weights of 8 bits, no ranges."""
    opened = ModelFolder(folder)
    lazy = LazyModel(opened, opened.dtype, torch.device("cpu"))
    chosen = recipe({"name": "quadapter", "steps": 1, "learning_rate": learning_rate}, weights={"bits": 8})
    plan = make_plan(lazy, find_blocks(lazy.module), chosen)
    with Journal(folder.parent / "never", {}, overwrite=False).held() as journal:
        plan, places = learn_scales(
            lazy,
            plan,
            chosen.transforms[0],
            random_set(folder).rows,
            torch.float32,
            journal,
            NoProgress(),  # type: ignore[arg-type]
        )
        journal.remove()
    with torch.inference_mode(False), torch.enable_grad():
        return ScaledModel(load_whole(opened, "cpu", "float32"), plan, places, None), places


def test_the_second_phase_computes_with_what_the_file_can_hold(tmp_path: Path) -> None:
    learner, places = scaled(with_other_norms(write_model(tmp_path / "model", "gpt2", torch.bfloat16)), 0.06)
    assert len(places) == 4
    for place in places:
        for name in (place.pair.producer.norm, place.pair.group.module):
            module = learner.model.get_submodule(f"{place.prefix}.{name}")
            for value in (module.weight.detach(), module.bias.detach()):
                assert torch.equal(value, value.bfloat16().float())


def test_rows_that_scales_are_judged_on_are_not_learned_from(
    planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[bool, set[int]] = {True: set(), False: set()}
    loss = ScaleFit.loss

    def noted(self: ScaleFit, logs: list[torch.Tensor], call: ModuleCall, target: torch.Tensor) -> torch.Tensor:
        seen[torch.is_grad_enabled()].add(hash(tuple(target.flatten().tolist())))
        return loss(self, logs, call, target)

    monkeypatch.setattr(ScaleFit, "loss", noted)
    chosen = recipe({"name": "quadapter", "steps": 20})
    cb.compress(planted, output=tmp_path / "out", recipe=chosen, calibration=random_set(planted, samples=16))
    # Of sixteen rows, in each of two blocks.
    assert len(seen[True]) == 2 * 14
    assert len(seen[False]) == 2 * 2
    assert not seen[True] & seen[False]


def test_the_second_phase_changes_no_weight_but_by_scales(planted: Path, tmp_path: Path) -> None:
    """Stored weights over the norms' gains are those of the model, to rounding."""
    chosen = recipe({"name": "quadapter", "steps": 10}, training={**SECOND, "learning_rate": 0.05}, weights={"bits": 8})
    cb.compress(planted, output=tmp_path / "out", recipe=chosen, calibration=random_set(planted), dtype="float32")
    before, after = load_file(planted / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    for block in range(2):
        name = f"model.layers.{block}"
        alpha = after[f"{name}.input_layernorm.weight"] / before[f"{name}.input_layernorm.weight"]
        packed = {
            key.removeprefix(f"{name}.self_attn.q_proj."): value
            for key, value in after.items()
            if "q_proj" in key and key.startswith(name)
        }
        codes = PackQuantized().read(packed, Layout(8, True, None))
        weight = (codes.codes.float() * codes.scale.float()) * alpha
        original = before[f"{name}.self_attn.q_proj.weight"]
        assert float((weight - original).norm() / original.norm()) < 0.02


def test_a_killed_first_phase_goes_on_after_the_block(planted: Path, tmp_path: Path) -> None:
    class Stops(NoProgress):
        def __init__(self) -> None:
            self.notes: list[str] = []

        @contextmanager
        def task(self, label: str, total: int | None, unit: str = "") -> Iterator[Any]:
            class Handle:
                def advance(self, steps: int = 1) -> None:
                    if label == "learning scales":
                        raise KeyboardInterrupt

            yield Handle()

    class Listens(NoProgress):
        notes: tuple[str, ...] = ()

        def note(self, text: str) -> None:
            self.notes += (text,)

    chosen, data = recipe({"name": "quadapter", "steps": 10}), random_set(planted)
    cb.compress(planted, output=tmp_path / "whole", recipe=chosen, calibration=data)
    with pytest.raises(KeyboardInterrupt):
        cb.compress(planted, output=tmp_path / "parts", recipe=chosen, calibration=data, progress=Stops())
    listener = Listens()
    cb.compress(planted, output=tmp_path / "parts", recipe=chosen, calibration=data, progress=listener)
    assert any("continues after block 1" in note for note in listener.notes)
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts"))
    assert first == second
    assert not (tmp_path / "parts.journal").exists()


def test_a_second_phase_with_nothing_to_learn_says_so(model_folder, tmp_path: Path) -> None:
    model = model_folder("olmo2")
    chosen = recipe({"name": "quadapter", "steps": 2}, training=SECOND, weights={"bits": 4})
    with pytest.raises(CalibrantError, match="nothing to learn"):
        cb.compress(model, output=tmp_path / "out", recipe=chosen, calibration=random_set(model))


def test_the_second_phase_needs_the_first() -> None:
    with pytest.raises(ValueError, match="add it to transforms"):
        recipe(training=SECOND)
