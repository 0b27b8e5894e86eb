"""Budgets: the allocation is the best there is, sensitivities are those of whole models, files hold what was chosen."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import calibrant as cb
from calibrant.calibration.calibration_set import CalibrationSet
from calibrant.engine import sensitivity
from calibrant.engine.allocation import allocate
from calibrant.engine.sensitivity import measure_sensitivities
from calibrant.errors import CalibrantError
from calibrant.formats.compressed_tensors import PackQuantized
from calibrant.formats.quantized import Layout
from calibrant.journal import Journal
from calibrant.methods.solvers.rtn import rtn
from calibrant.modeling.checkpoint import ModelFolder
from calibrant.modeling.find_blocks import find_blocks
from calibrant.modeling.lazy_model import LazyModel
from calibrant.modeling.token_rows import TokenRows
from calibrant.progress import NoProgress
from calibrant.quantization.grids import GridSpec
from calibrant.recipes.recipe import Recipe
from tests.conftest import random_set, write_model


@settings(max_examples=30, deadline=None)
@given(units=st.integers(1, 5), average=st.sampled_from([2.0, 3.1, 4.0, 7.9]), seed=st.integers(0, 99))
def test_the_allocation_is_the_best_of_all(units: int, average: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    choices = np.array([2.0, 4.0, 8.0])
    costs, sizes = generator.random((units, 3)), generator.integers(1, 9, units).astype(float)
    found = allocate(costs, sizes, choices, average, at_most=True)

    def mean(chosen: tuple[int, ...]) -> float:
        return float((choices[list(chosen)] * sizes).sum() / sizes.sum())

    affordable = [one for one in itertools.product(range(3), repeat=units) if mean(one) <= average + 1e-9]
    best = min(sum(costs[unit, choice] for unit, choice in enumerate(one)) for one in affordable)
    assert mean(tuple(found.chosen)) <= average + 1e-6
    assert found.cost == pytest.approx(best)
    assert found.bound == pytest.approx(best, abs=1e-6)


def test_an_average_that_no_choice_reaches_is_refused() -> None:
    costs = np.ones((2, 2))
    with pytest.raises(ValueError, match=r"cannot average 0\.9"):
        allocate(costs, np.ones(2), np.array([0.3, 0.5]), 0.9, at_most=False)


@pytest.mark.parametrize("masked", [0, 10])
def test_sensitivities_are_divergences_of_whole_models(llama: Path, tmp_path: Path, masked: int) -> None:
    model = LazyModel(ModelFolder(llama), torch.float32, torch.device("cpu"))
    blocks, calibration = find_blocks(model.module), random_set(llama, masked=masked)
    spec, sums = GridSpec(2, True, 32, torch.float32), []

    def rounded(weight: torch.Tensor, squares: torch.Tensor, _: float) -> torch.Tensor:
        sums.append(squares.clone())
        return rtn(weight, spec).weight

    journal = Journal(tmp_path / "out", {}, False)
    with journal.held():
        measured = measure_sensitivities(
            model, blocks, lambda _: False, [2], rounded, calibration.rows, torch.float32, journal, NoProgress()
        )
    assert [len(one.layers) for one in measured] == [3, 1, 2, 1] * 2
    row = calibration.mask.any(1).nonzero()[0]
    tokens, mask = calibration.tokens[row].long(), calibration.mask[row][0]
    positions = mask.nonzero()[::4, 0]

    def logits(changed: list[str]) -> torch.Tensor:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
        with torch.no_grad():
            for name in changed:
                weight = loaded.get_submodule(name).weight
                weight.copy_(rtn(weight, spec).weight)
            return torch.log_softmax(loaded(tokens).logits[0, positions].double(), -1)

    def inputs(name: str) -> torch.Tensor:
        loaded, seen = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval(), []
        loaded.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
        with torch.no_grad():
            loaded(tokens)
        return seen[0][mask]

    for squares, name in zip(sums, [name for one in measured for name in one.layers], strict=True):
        torch.testing.assert_close(squares, inputs(name).square().sum(0), rtol=1e-3, atol=1e-5)
    original = logits([])
    for one in measured:
        expected = (original.exp() * (original - logits(one.layers))).sum(-1).mean()
        assert one.divergences[0] == pytest.approx(float(expected), rel=2e-3, abs=1e-7)


def recipe(**fields: object) -> Recipe:
    return Recipe.model_validate({"name": "r", "description": "d", "method": {"name": "gptq"}, **fields})


QUANTIZE = {"scheme": {"weights": {"bits": 4, "group_size": 32}}, "budget": {"choices": [2, 4, 8]}}


def test_a_file_of_mixed_widths_holds_what_was_chosen(llama: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    cb.compress(llama, output=output, recipe=recipe(**QUANTIZE), calibration=random_set(llama), dtype="float32")
    record = json.loads((output / "calibrant.json").read_text())
    budget = record["budget"]
    assert budget["average"] <= 4 + 1e-6
    assert budget["divergence"] <= budget["uniform"] + 1e-9
    assert budget["bound"] == pytest.approx(budget["divergence"], abs=1e-5)
    bits = {
        layer: choice
        for one, choice in zip(budget["sensitivities"], budget["chosen"], strict=True)
        for layer in one["layers"]
    }
    assert len(set(bits.values())) > 1
    config = json.loads((output / "config.json").read_text())["quantization_config"]
    stored = {
        name: group["weights"]["num_bits"] for group in config["config_groups"].values() for name in group["targets"]
    }
    assert stored == bits
    assert any(note.startswith("budget: bits of groups of layers") for note in record["notes"])
    tensors = load_file(output / "model.safetensors")
    reference = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    for name, width in bits.items():
        own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        codes = PackQuantized().read(own, Layout(int(width), True, 32))
        assert int(codes.codes.max()) < 2 ** (width - 1)
        scale = codes.scale.float().repeat_interleave(32, 1)
        reference.get_submodule(name).weight.data = codes.codes.float() * scale
    loaded = transformers.AutoModelForCausalLM.from_pretrained(output).eval()
    tokens = random_set(seed=9).tokens.long()
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, reference(tokens).logits, rtol=1e-4, atol=1e-4)
    result = cb.evaluate(output, against=llama, length=32, limit=2)
    assert result.divergence is not None


def test_an_average_of_its_own_is_kept_and_what_exceeds_it_is_not_compared(llama: Path, tmp_path: Path) -> None:
    chosen = recipe(**{**QUANTIZE, "budget": {"choices": [2, 4, 8], "average": 3}})
    cb.compress(llama, output=tmp_path / "out", recipe=chosen, calibration=random_set(llama), dtype="float32")
    record = json.loads((tmp_path / "out" / "calibrant.json").read_text())
    assert 2.5 < record["budget"]["average"] <= 3 + 1e-6
    assert record["budget"]["uniform"] is None
    assert not any("uniformly" in note for note in record["notes"])


def test_zeros_average_to_the_budget(llama: Path, tmp_path: Path) -> None:
    chosen = recipe(method={"name": "sparsegpt"}, scheme={"sparsity": "0.5"}, budget={"choices": [0.25, 0.5, 0.75]})
    report = cb.compress(llama, output=tmp_path / "out", recipe=chosen, calibration=random_set(llama), dtype="float32")
    shares = {layer.name: layer.zeros / layer.elements for layer in report.layers}
    assert sum(layer.zeros for layer in report.layers) >= 0.5 * sum(layer.elements for layer in report.layers)
    for share in shares.values():
        assert min(abs(share - choice) for choice in (0.25, 0.5, 0.75)) < 0.01


def test_what_a_budget_cannot_be(llama: Path, model_folder, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="widths that files have"):
        recipe(**{**QUANTIZE, "budget": {"choices": [3, 4]}})
    with pytest.raises(ValueError, match="needs symmetric weights"):
        recipe(**{**QUANTIZE, "scheme": {"weights": {"bits": 4, "symmetric": False}}})
    with pytest.raises(ValueError, match="no pattern n:m"):
        recipe(method={"name": "sparsegpt"}, scheme={"sparsity": "2:4"}, budget={"choices": [0.5, 0.6]})
    with pytest.raises(ValueError, match="name one twice"):
        recipe(**{**QUANTIZE, "budget": {"choices": [4, 4]}})
    for budget in ({"choices": [2, 4], "average": 1.5}, {"choices": [2, 4], "average": 9}):
        with pytest.raises(ValueError, match="cannot average"):
            recipe(**{**QUANTIZE, "budget": budget})
    with pytest.raises(ValueError, match=r"\[0.3, 0.4\] cannot average 0.5"):
        recipe(method={"name": "sparsegpt"}, scheme={"sparsity": "0.5"}, budget={"choices": [0.3, 0.4]})
    options = {"output": tmp_path / "out", "calibration": random_set(llama)}
    with pytest.raises(CalibrantError, match="compressed-tensors can hold"):
        cb.compress(llama, recipe=recipe(**QUANTIZE), checkpoint_format="gptq", **options)
    with pytest.raises(CalibrantError, match="which a budget cannot measure"):
        cb.compress(model_folder("mixtral"), recipe=recipe(**QUANTIZE), **options)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_budget_that_changes_nothing_leaves_every_byte(tmp_path: Path, stored: torch.dtype, dtype: str) -> None:
    """Measuring runs the model in another dtype than it is stored in, before it is read again to be compressed."""
    model = write_model(tmp_path / "model", "llama", stored)
    plain = {
        "name": "r",
        "description": "d",
        "method": {"name": "rtn"},
        "scheme": {"weights": {"bits": 8, "group_size": 32}},
    }
    for name, more in {"plain": {}, "budget": {"budget": {"choices": [2, 8], "average": 8}}}.items():
        chosen = Recipe.model_validate({**plain, **more})
        cb.compress(model, output=tmp_path / name, recipe=chosen, calibration=random_set(model), dtype=dtype)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "budget"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


@pytest.mark.parametrize(("counted", "row", "begin"), [
    ({2: [30, 31], 5: range(20, 32)}, 5, 16),  # late
    ({0: range(6, 14), 1: [0, *range(25, 32)]}, 0, 0),  # many in the row, most of them apart from the others
    ({0: range(4, 10), 3: range(26, 32)}, 0, 0),  # of equals the earlier
    (dict.fromkeys(range(8), range(32)), 0, 0),
])  # fmt: skip
def test_a_budget_looks_where_most_tokens_count(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: dict, row: int, begin: int
) -> None:
    monkeypatch.setattr(sensitivity, "WINDOW_TOKENS", 16)
    walked: list[TokenRows] = []
    walk = sensitivity.BlockWalk
    monkeypatch.setattr(sensitivity, "BlockWalk", lambda *args: (walked.append(args[2]), walk(*args))[1])
    whole = random_set(llama)
    mask = torch.zeros_like(whole.mask)
    for number, places in counted.items():
        mask[number, list(places)] = True
    late = CalibrationSet.build(whole.tokens, mask, whole.manifest)
    cb.compress(llama, output=tmp_path / "out", recipe=recipe(**QUANTIZE), calibration=late, dtype="float32")
    here = slice(begin, begin + 16)
    assert torch.equal(walked[0].ids, whole.tokens[row : row + 1, here])
    assert torch.equal(walked[0].counted, mask[row : row + 1, here])


def test_a_budget_needs_a_token_that_counts(llama: Path, tmp_path: Path) -> None:
    whole = random_set(llama)
    none = CalibrationSet.build(whole.tokens, torch.zeros_like(whole.mask), whole.manifest)
    with pytest.raises(CalibrantError, match="counts no token"):
        cb.compress(llama, output=tmp_path / "out", recipe=recipe(**QUANTIZE), calibration=none)


def test_a_model_with_a_bias_in_its_head_can_have_a_budget(model_folder, tmp_path: Path) -> None:
    """Tying it replaces the bias's data, which failed in inference mode."""
    model = model_folder("bert_mlm")
    chosen, data = recipe(**QUANTIZE), random_set(model)
    cb.compress(model, output=tmp_path / "out", recipe=chosen, calibration=data, dtype="float32", allow_encoder=True)
    assert json.loads((tmp_path / "out" / "calibrant.json").read_text())["budget"]["sensitivities"]


TYPES = {"scheme": {"weights": {"type": "q4_k", "range_search": "importance"}}}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({**TYPES, "budget": {"choices": [2, 4]}}, "names no bits"),
        ({**TYPES, "budget": {"choices": ["q4_k", 4]}}, "names no bits"),
        ({**QUANTIZE, "budget": {"choices": ["q4_k", "q6_k"]}}, "goes with weights of such a type"),
        ({**TYPES, "budget": {"choices": ["q4_k", "q4_k"]}}, "name one twice"),
        (
            {
                "method": {"name": "sparsegpt"},
                "scheme": {"weights": {"type": "q4_0"}, "sparsity": "2:4"},
                "budget": {"choices": ["q4_0", "q8_0"]},
            },
            "of types or of zeros, not of both",
        ),
        ({**TYPES, "budget": {"choices": ["q2_k", "q3_k"]}}, "cannot average 4.5 bits"),
        ({**TYPES, "budget": {"choices": ["q2_k", "q9_k"]}}, "'q9_k' is no number and no type of GGUF files"),
    ],
)
def test_what_a_budget_of_types_cannot_be(fields: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        recipe(**fields)


def test_bits_are_no_types_in_a_gguf_file(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrantError, match="a budget of bits needs layers that compressed-tensors"):
        cb.compress(
            llama, output=tmp_path / "out", recipe=recipe(**QUANTIZE), calibration=random_set(llama),
            checkpoint_format="gguf",
        )  # fmt: skip
