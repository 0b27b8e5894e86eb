"""SmoothQuant and AWQ: their formulas, and that they help where they should and change nothing where they must not."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import calibrant as cb
from calibrant.engine import block_transforms
from calibrant.methods.solvers.rtn import rtn
from calibrant.methods.transforms.awq import awq_candidates, best_scale
from calibrant.methods.transforms.smoothquant import smoothquant_scale
from calibrant.quantization.grids import GridSpec
from calibrant.recipes.recipe import Recipe, load_recipe
from tests.conftest import random_set


def weights() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(8, 16, generator=generator), torch.randn(4, 16, generator=generator)]


def test_smoothquant_is_its_formula() -> None:
    inputs = torch.rand(16, generator=torch.Generator().manual_seed(1)) * 9
    inputs[3] = 0
    scale = smoothquant_scale(inputs, weights(), 0.3)
    for j in range(16):
        largest = max(float(weight[:, j].abs().max()) for weight in weights())
        expected = float(inputs[j]) ** 0.3 / largest**0.7 if j != 3 else 1.0
        assert scale[j].item() == pytest.approx(expected, rel=1e-5)


def test_smoothquant_without_activations_evens_the_weights_out() -> None:
    scale = smoothquant_scale(torch.ones(16), weights(), 0.0)
    largest = torch.cat([weight * scale for weight in weights()]).abs().amax(0)
    torch.testing.assert_close(largest, torch.ones(16))


def test_awq_tries_the_identity_first_and_then_the_powers() -> None:
    mean = torch.rand(16, generator=torch.Generator().manual_seed(1)) + 0.1
    tried = list(awq_candidates(mean, weights(), 4, False, 8))
    assert len(tried) == 4
    assert torch.equal(tried[0], torch.ones(16))
    for ratio, scale in zip((0.25, 0.5, 0.75), tried[1:], strict=True):
        proportion = scale / mean**ratio
        torch.testing.assert_close(proportion, proportion[:1].expand(16))
        assert (scale.max() * scale.min()).item() == pytest.approx(1.0, rel=1e-5)


def test_awq_s_scales_do_not_hang_on_channels_that_carry_nothing() -> None:
    mean = torch.rand(16, generator=torch.Generator().manual_seed(1)) + 0.1
    mean[3] = 0.0
    carries = mean > 0
    for scale in awq_candidates(mean, weights(), 4, False, 8):
        assert scale[3] == scale[carries].min()
        assert (scale[carries].max() * scale[carries].min()).item() == pytest.approx(1.0, rel=1e-5)
    assert len(list(awq_candidates(torch.zeros(16), weights(), 4, False, 8))) == 1


def test_awq_duo_divides_by_the_weights() -> None:
    mean = torch.ones(16)
    relative = torch.cat(weights()).view(12, 2, 8).abs()
    relative = (relative / relative.amax(-1, keepdim=True)).view(12, 16).mean(0)
    first = list(awq_candidates(mean, weights(), 4, True, 8))[1]
    proportion = first * (relative + 1e-4)
    torch.testing.assert_close(proportion, proportion[:1].expand(16))


def test_the_best_scale_is_the_first_of_least_loss() -> None:
    losses = iter([3.0, 2.0, 1.0, 1.0, 5.0])
    candidates = (torch.tensor([float(i)]) for i in range(5))
    assert best_scale(candidates, lambda _: next(losses)).item() == 2.0


def recipe(method: dict, bits: int = 4, **fields: object) -> Recipe:
    scheme = {"weights": {"bits": bits, "group_size": 32}}
    return Recipe.model_validate({"name": "r", "description": "d", "method": method, "scheme": scheme, **fields})


def with_outlier_channels(folder: Path) -> Path:
    """The model with some channels of every norm 20 times as large, so that their columns matter most."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    generator = torch.Generator().manual_seed(0)
    for name in tensors:
        if name.endswith("layernorm.weight"):
            tensors[name] = tensors[name] * torch.where(torch.rand(64, generator=generator) < 0.08, 20.0, 1.0)
    save_file(tensors, file, {"format": "pt"})
    return folder


def change(model: Path, output: Path, chosen: Recipe) -> float:
    """Mean squared change of the hidden states after the first block."""
    cb.compress(model, output=output, recipe=chosen, calibration=random_set(model), dtype="float32")
    tokens = random_set(seed=9).tokens.long()
    after = []
    for folder in (model, output):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():
            after.append(loaded(tokens, output_hidden_states=True).hidden_states[1])
    return float((after[0] - after[1]).square().mean())


@pytest.fixture
def outliers(llama: Path, tmp_path: Path) -> Path:
    return with_outlier_channels(shutil.copytree(llama, tmp_path / "outliers"))


def test_awq_helps_where_channels_are_large(outliers: Path, tmp_path: Path) -> None:
    plain = change(outliers, tmp_path / "plain", recipe({"name": "rtn"}, 3))
    scaled = change(outliers, tmp_path / "awq", recipe({"name": "rtn"}, 3, transforms=[{"name": "awq"}]))
    assert scaled < 0.8 * plain


def test_one_step_of_awq_is_round_to_nearest(outliers: Path, tmp_path: Path) -> None:
    awq = recipe({"name": "rtn"}, transforms=[{"name": "awq", "steps": 1}])
    for name, chosen in (("awq", awq), ("rtn", recipe({"name": "rtn"}))):
        cb.compress(outliers, output=tmp_path / name, recipe=chosen, calibration=random_set(outliers), dtype="float32")
    left, right = (load_file(tmp_path / name / "model.safetensors") for name in ("awq", "rtn"))
    assert all(torch.equal(left[name], right[name]) for name in right)


def test_the_record_says_where_scales_moved(outliers: Path, tmp_path: Path) -> None:
    chosen = load_recipe("awq-gptq-w4a16")
    cb.compress(outliers, output=tmp_path / "out", recipe=chosen, calibration=random_set(outliers), dtype="float32")
    notes = json.loads((tmp_path / "out" / "calibrant.json").read_text())["notes"]
    moved = [note for note in notes if note.startswith("awq scales moved")]
    assert len(moved) == 1
    assert "mlp.up_proj -> mlp.down_proj" in moved[0]


def test_smoothquant_moves_scales_out_of_norms_alone(outliers: Path, tmp_path: Path) -> None:
    chosen = recipe({"name": "rtn"}, 8, transforms=[{"name": "smoothquant"}])
    report = cb.compress(
        outliers, output=tmp_path / "out", recipe=chosen, calibration=random_set(outliers), dtype="float32"
    )
    (moved,) = [note for note in report.notes if note.startswith("smoothquant scales moved")]
    sources = [place.split(" -> ")[0] for place in moved.removeprefix("smoothquant scales moved: ").split(", ")]
    assert sources == ["input_layernorm", "post_attention_layernorm"]


@pytest.mark.parametrize(("samples", "counted", "positions", "rows", "tokens"), [
    (8, 32, 4096, [3], 100),
    (8, 12, 4096, [8], 96),
    (128, 1, 4096, [64, 36], 100),  # two micro-batches of 64 rows
    (128, 1, 2048, [64], 64),
])  # fmt: skip
def test_awq_compares_outputs_of_so_many_counted_tokens(
    outliers: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    samples: int,
    counted: int,
    positions: int,
    rows: list[int],
    tokens: int,
) -> None:
    """Rows of a lone linear's input, and whole sequences of a module around several, up to that number."""
    monkeypatch.setattr(block_transforms, "_SEARCH_TOKENS", 100)
    monkeypatch.setattr(block_transforms, "_SEARCH_POSITIONS", positions)
    sequences, inputs = [], []
    shortened, loss = block_transforms.ModuleCall.shortened, block_transforms._output_loss

    def noted_call(call, number):
        sequences.append(number)
        return shortened(call, number)

    def noted_loss(linears, weights, block, seen, spec):
        if seen.rows:
            inputs.append(sum(map(len, seen.rows)))
        return loss(linears, weights, block, seen, spec)

    monkeypatch.setattr(block_transforms.ModuleCall, "shortened", noted_call)
    monkeypatch.setattr(block_transforms, "_output_loss", noted_loss)
    chosen = recipe({"name": "rtn"}, transforms=[{"name": "awq"}])
    calibration = random_set(outliers, samples=samples, masked=32 - counted)
    cb.compress(outliers, output=tmp_path / "out", recipe=chosen, calibration=calibration, dtype="float32")
    assert sequences == rows * (len(sequences) // len(rows))
    assert set(inputs) == {tokens}


@pytest.mark.parametrize("kind", ["smoothquant", "awq"])
def test_scales_come_from_the_inputs_that_the_model_computes(
    outliers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """SmoothQuant from the largest, AWQ from the mean magnitude of each channel over counted tokens."""
    given: list[torch.Tensor] = []
    name = {"smoothquant": "smoothquant_scale", "awq": "awq_candidates"}[kind]
    real = getattr(block_transforms, name)
    monkeypatch.setattr(block_transforms, name, lambda first, *rest: (given.append(first), real(first, *rest))[1])
    calibration = random_set(outliers, masked=5)
    method = recipe({"name": "rtn"}, transforms=[{"name": kind}])
    cb.compress(outliers, output=tmp_path / "out", recipe=method, calibration=calibration, dtype="float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(outliers, dtype=torch.float32).eval()
    inputs: list[torch.Tensor] = []
    model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        model(calibration.tokens.long())
    seen = inputs[0].double()[calibration.mask].abs()
    expected = seen.amax(0) if kind == "smoothquant" else seen.mean(0)
    torch.testing.assert_close(given[0].double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("parent", "names", "number"),
    [
        ("self_attn", ["q_proj", "k_proj", "v_proj"], 0),
        ("mlp", ["gate_proj", "up_proj"], 1),
        ("mlp.down_proj", [""], 2),
    ],
)
def test_awq_takes_the_scale_that_changes_the_output_least(
    outliers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parent: str, names: list[str], number: int
) -> None:
    """The searches of the first block, in float64: what the parent module gives for counted tokens when all linears
    that share the input are rounded with scaled columns.
    """
    tried: list[tuple[list[torch.Tensor], torch.Tensor]] = []

    def noted(candidates, loss):
        every = list(candidates)
        tried.append((every, best_scale(iter(every), loss)))
        return tried[-1][1]

    monkeypatch.setattr(block_transforms, "best_scale", noted)
    calibration = random_set(outliers, masked=7)
    method = recipe({"name": "rtn"}, 3, transforms=[{"name": "awq"}])
    cb.compress(outliers, output=tmp_path / "out", recipe=method, calibration=calibration, dtype="float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(outliers, dtype=torch.float64).eval()
    module = model.model.layers[0].get_submodule(parent)
    calls: list[tuple] = []
    module.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    linears = [module.get_submodule(name) for name in names]
    kept = [linear.weight.detach().clone() for linear in linears]

    def output() -> torch.Tensor:
        given = module(*calls[0][0], **calls[0][1])
        return (given[0] if isinstance(given, tuple) else given)[calibration.mask]

    def loss(scale: torch.Tensor) -> float:
        for linear, weight in zip(linears, kept, strict=True):
            scaled = rtn(weight.float() * scale, GridSpec(3, True, 32, torch.float32)).weight / scale
            linear.weight.copy_(scaled)
        return float((output() - expected).square().sum())

    with torch.no_grad():
        model(calibration.tokens.long(), use_cache=False)  # a cache would grow with every call
        expected = output()
        every, best = tried[number]
        assert loss(best) == pytest.approx(min(map(loss, every)), rel=1e-3)
        assert loss(best) < 0.98 * loss(every[0])


@pytest.mark.parametrize("kind", ["smoothquant", "awq"])
def test_transforms_leave_ignored_layers_alone(outliers: Path, tmp_path: Path, kind: str) -> None:
    chosen = recipe({"name": "rtn"}, transforms=[{"name": kind}], ignore=["self_attn"])
    cb.compress(outliers, output=tmp_path / "out", recipe=chosen, calibration=random_set(outliers), dtype="float32")
    before, after = (load_file(folder / "model.safetensors") for folder in (outliers, tmp_path / "out"))
    alone = [name for name in before if "self_attn" in name or "input_layernorm" in name]
    assert all(torch.equal(before[name], after[name]) for name in alone)
    assert not torch.equal(*(found["model.layers.0.post_attention_layernorm.weight"] for found in (before, after)))


def test_awq_searches_for_the_compressed_layers_alone(
    outliers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of q, k and v two are ignored: they are scaled along, exactly, and only v is rounded in the search."""
    given: list[list[torch.Tensor]] = []
    monkeypatch.setattr(
        block_transforms,
        "awq_candidates",
        lambda *args: (given.append([one.clone() for one in args[1]]), awq_candidates(*args))[1],
    )
    chosen = recipe({"name": "rtn"}, transforms=[{"name": "awq"}], ignore=["q_proj", "k_proj"])
    cb.compress(outliers, output=tmp_path / "out", recipe=chosen, calibration=random_set(outliers), dtype="float32")
    before, after = (load_file(folder / "model.safetensors") for folder in (outliers, tmp_path / "out"))
    assert torch.equal(given[0][0], before["model.layers.0.self_attn.v_proj.weight"])
    assert len(given[0]) == 1
    name = "model.layers.0.{}.weight"
    product = [
        found[name.format("input_layernorm")] * found[name.format("self_attn.q_proj")] for found in (before, after)
    ]
    torch.testing.assert_close(product[0], product[1])


@pytest.mark.parametrize("kind", ["smoothquant", "awq"])
def test_gains_stored_less_one_keep_their_digits(model_folder, tmp_path: Path, kind: str) -> None:
    """Gemma's norms: some gains are 0, many small. No scale makes one smaller, and bfloat16 holds what is stored."""
    model = shutil.copytree(model_folder("gemma3"), tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in tensors:
        if name.endswith("layernorm.weight"):
            gain = torch.rand(tensors[name].shape, generator=generator).pow(4) * 20
            gain[:3] = 0.0
            tensors[name] = (gain - 1).bfloat16().float()
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    chosen = recipe({"name": "rtn"}, 8, transforms=[{"name": kind}])
    cb.compress(model, output=tmp_path / "out", recipe=chosen, calibration=random_set(model), dtype="bfloat16")
    after, moved = load_file(tmp_path / "out" / "model.safetensors"), 0
    for name in after:
        if name.endswith("layernorm.weight"):
            old, new = tensors[name] + 1, after[name] + 1
            moved += not torch.equal(old, new)
            assert torch.equal(after[name], after[name].bfloat16().float())
            assert bool((new >= old * (1 - 2**-7) - 2**-9).all())
            assert torch.equal(new == 0, old == 0)
    assert moved >= 2


def test_transforms_need_weights_to_quantize() -> None:
    fields = {"name": "r", "description": "d", "method": {"name": "wanda"}, "scheme": {"sparsity": "2:4"}}
    with pytest.raises(ValueError, match="the scheme needs weights"):
        Recipe.model_validate({**fields, "transforms": [{"name": "awq"}]})


def test_smoothquant_before_plain_rounding_looks_at_the_original_model(llama: Path, tmp_path: Path) -> None:
    """In one pass over each block: what compressed blocks give is never asked for."""
    for name, order in {"default": "sequential", "original": "independent"}.items():
        cb.compress(
            llama,
            output=tmp_path / name,
            recipe="smoothquant-w8a8",
            calibration=random_set(llama),
            order=order,
            dtype="float32",
        )
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("default", "original"))
    assert all(torch.equal(first[name], second[name]) for name in first)
