"""Static int8 activations: the ranges, and a loaded model that rounds its inputs to them."""

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import calibrant as cb
from calibrant.errors import CalibrantError
from calibrant.quantization.activation_ranges import InputRange
from calibrant.recipes.recipe import Recipe
from tests.conftest import random_set


def seen(*batches: torch.Tensor) -> InputRange:
    found = InputRange(torch.device("cpu"))
    for batch in batches:
        found.add(batch)
    return found


def heavy_tailed(tokens: int = 40000) -> torch.Tensor:
    values = torch.randn(tokens, 8, generator=torch.Generator().manual_seed(0)) + 0.3
    values[0, 0] = 12.0
    return values


def error(values: torch.Tensor, found: InputRange, rule: str) -> float:
    grid = found.grid(rule, 99.9, torch.float32)
    codes = (values.double() / grid.scale.double()).round().add(grid.zero_point.double()).clamp(-128, 127)
    return float(((codes - grid.zero_point.double()) * grid.scale.double() - values.double()).square().sum())


def test_minmax_covers_everything_seen_and_zero() -> None:
    values = torch.rand(100, 4, generator=torch.Generator().manual_seed(0)) + 1.0
    grid = seen(values[:30], values[30:]).grid("minmax", 99.9, torch.float32)
    assert grid.scale.item() == pytest.approx(float(values.max()) / 255, rel=1e-6)
    assert grid.zero_point.item() == -128


def test_percentiles_are_those_of_the_values() -> None:
    values = heavy_tailed()
    grid = seen(values[:1000], values[1000:]).grid("percentile", 99.0, torch.float32)
    low, high = torch.quantile(values.flatten(), torch.tensor([0.005, 0.995]))
    # 4,096 bins over twice 16.
    assert grid.scale.item() * 255 == pytest.approx(float(high - low), abs=0.02)


def test_mse_costs_least_and_batches_do_not_matter() -> None:
    values = heavy_tailed()
    whole, parts = seen(values), seen(values[2000:], values[:50], values[50:2000])
    assert whole.grid("mse", 99.9, torch.float32) == parts.grid("mse", 99.9, torch.float32)
    assert error(values, whole, "mse") < 0.9 * error(values, whole, "minmax")
    assert error(values, whole, "mse") < error(values, whole, "percentile")


def test_mse_finds_ranges_far_below_the_largest_value() -> None:
    """Compared with all shares, on the values instead of the histogram, in float64."""
    values = torch.randn(400_000, 8, generator=torch.Generator().manual_seed(0))
    values[0, 0] = 30.0

    def cost(share: float) -> float:
        low, high = share * float(values.min()), share * 30.0
        scale = (high - low) / 255
        zero_point = round(-128 - low / scale)
        codes = (values.double() / scale + zero_point).round().clamp(-128, 127)
        return float(((codes - zero_point) * scale - values.double()).square().sum())

    shares = [step / 100 for step in range(1, 101)]
    best = min(shares, key=cost)
    assert best < 0.7
    found = float(seen(values).grid("mse", 99.9, torch.float32).scale) * 255 / (30.0 - float(values.min()))
    assert cost(found) == pytest.approx(cost(best), rel=0.05)


@pytest.mark.parametrize("percent", [63, 64])
def test_mse_tries_every_hundredth_of_the_range(percent: int) -> None:
    """Values on the grid of one share, except one at each end of the range."""
    reach = 30.0 * percent / 100
    codes = torch.randint(0, 256, (500_000, 1), generator=torch.Generator().manual_seed(0))
    values = (codes - 127.5) * (2 * reach / 255)
    values[0], values[1] = -30.0, 30.0
    # An asymmetric grid contains 0, so its points are shifted by half a step from symmetric values.
    values += reach / 255
    scale = float(seen(values).grid("mse", 99.9, torch.float32).scale)
    assert scale * 255 == pytest.approx(2 * reach, rel=1e-3)


def test_ranges_are_of_all_counted_tokens(llama: Path, tmp_path: Path) -> None:
    calibration, output = random_set(llama, masked=5), tmp_path / "out"
    cb.compress(llama, output=output, recipe=recipe(dynamic=False), calibration=calibration, dtype="float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    inputs = []
    name = "model.layers.0.self_attn.q_proj"
    model.get_submodule(name).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        model(calibration.tokens.long())
    counted = inputs[0][calibration.mask]
    stored = load_file(output / "model.safetensors")[f"{name}.input_scale"]
    assert stored.item() == pytest.approx(float(counted.max() - counted.min()) / 255, rel=1e-4)


def test_inputs_of_nothing_but_zeros_have_a_grid() -> None:
    for rule in ("minmax", "percentile", "mse"):
        grid = seen(torch.zeros(5, 3)).grid(rule, 99.9, torch.float32)
        assert (grid.scale.item(), grid.zero_point.item()) == (1.0, 0)


def recipe(**activations: object) -> Recipe:
    scheme = {"weights": {"bits": 8}, "activations": activations}
    return Recipe.model_validate({"name": "r", "description": "d", "method": {"name": "rtn"}, "scheme": scheme})


@pytest.mark.parametrize("rule", ["minmax", "percentile", "mse"])
def test_the_loaded_model_rounds_its_inputs_as_the_file_says(llama: Path, tmp_path: Path, rule: str) -> None:
    output = tmp_path / "out"
    chosen = recipe(dynamic=False, range=rule)
    cb.compress(llama, output=output, recipe=chosen, calibration=random_set(llama), dtype="float32")
    tensors = load_file(output / "model.safetensors")
    reference = transformers.AutoModelForCausalLM.from_pretrained(llama).eval()

    def rounded(name: str, module: nn.Linear) -> None:
        scale, zero_point = tensors[f"{name}.input_scale"], tensors[f"{name}.input_zero_point"].float()
        module.weight.data = tensors[f"{name}.weight"].float() * tensors[f"{name}.weight_scale"]

        def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            return (((args[0] / scale + zero_point).round().clamp(-128, 127) - zero_point) * scale,)

        module.register_forward_pre_hook(hook)

    for name, module in reference.named_modules():
        if f"{name}.input_scale" in tensors:
            rounded(name, module)
    assert sum(name.endswith("input_scale") for name in tensors) == 14
    loaded = transformers.AutoModelForCausalLM.from_pretrained(output).eval()
    tokens = random_set(seed=9).tokens.long()
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, reference(tokens).logits, rtol=1e-3, atol=1e-3)


def test_dynamic_activations_have_no_range() -> None:
    with pytest.raises(ValueError, match="dynamic: false"):
        recipe(range="mse")


def test_a_recipe_with_dynamic_activations_can_change_its_weights() -> None:
    assert recipe().with_weights(8, 0).scheme.activations == recipe().scheme.activations


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_are_refused(llama: Path, tmp_path: Path, value: float) -> None:
    model = shutil.copytree(llama, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][3] = value
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(CalibrantError, match=r"model\.layers\.1\.self_attn\.q_proj: its inputs .* not finite"):
        cb.compress(model, output=tmp_path / "out", recipe=recipe(dynamic=False), calibration=random_set(model))
