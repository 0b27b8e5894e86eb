"""Whole runs on tiny models: what is on disk loads elsewhere, equals what was solved, and is the same every time."""

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import calibrant as cb
from calibrant import prepare
from calibrant.calibration.calibration_set import CalibrationSet
from calibrant.errors import CalibrantError
from calibrant.formats.quantized import FormatName
from calibrant.hashing import sha256_file
from calibrant.methods.solvers.rtn import rtn
from calibrant.pipeline import estimate, own_set
from calibrant.pipeline.record import RunReport
from calibrant.quantization.grids import GridSpec
from calibrant.recipes.recipe import Recipe, builtin_recipes, load_recipe
from tests.checkpoints import put_stored_weights
from tests.conftest import ARCHITECTURES, VOCABULARY, random_set, write_model, write_tokenizer


def _is_of_integers(recipe: Recipe) -> bool:
    """Floats and llama.cpp's types have tests of their own, in formats/ and pipeline/."""
    weights, activations = recipe.scheme.weights, recipe.scheme.activations
    return (weights is None or weights.type == "int") and (activations is None or activations.type == "int8")


# How the scheme of each recipe looks on a tiny model whose widths 128 does not divide.
RECIPES = [
    name
    for name, recipe in builtin_recipes().items()
    if "g128" not in name and "g64" not in name and _is_of_integers(recipe)
]


def run(
    model: Path, output: Path, recipe: str = "gptq-w4a16-g32", made: CalibrationSet | None = None, **options
) -> RunReport:
    chosen = load_recipe(recipe)
    if chosen.scheme.weights is not None and isinstance(chosen.scheme.weights.group_size, int):
        chosen = chosen.with_weights(None, 32)
    if chosen.training is not None:
        few = {"steps": 10, "eval_steps": 5}
        chosen = chosen.model_copy(update={"method": chosen.training.model_copy(update=few)})
    options = {"dtype": "float32", "allow_encoder": True, **options}
    return cb.compress(model, output=output, recipe=chosen, calibration=made or random_set(model), **options)


def load(folder: Path, architecture: str) -> transformers.PreTrainedModel:
    return type(ARCHITECTURES[architecture]()).from_pretrained(folder).eval()


def logits(model: transformers.PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=random_set(seed=9).tokens.long()).logits


def in_memory(model: Path, output: Path, architecture: str) -> transformers.PreTrainedModel:
    """The original model with what the output stores put in."""
    original = load(model, architecture)
    put_stored_weights(original, output, group_size=32)
    return original


DATA_FREE = [name for name in RECIPES if not load_recipe(name).needs_data and load_recipe(name).training is None]


@pytest.mark.parametrize("recipe", DATA_FREE)
def test_methods_without_data_have_no_spread_over_sets(model_folder, tmp_path: Path, recipe: str) -> None:
    model = model_folder("llama")
    for seed in (1, 2):
        run(model, tmp_path / str(seed), recipe, random_set(model, seed=seed))
    for name in ("model.safetensors", "calibrant.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


@pytest.mark.parametrize("recipe", ["gptq-w4a16-g32", "wanda-2:4", "awq-gptq-w4a16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_compresses_saves_reloads_and_matches(
    model_folder, tmp_path: Path, architecture: str, recipe: str
) -> None:
    model, output = model_folder(architecture), tmp_path / "out"
    run(model, output, recipe)
    loaded = load(output, architecture)
    ours = logits(loaded)
    before = logits(load(model, architecture))
    assert not torch.equal(ours, before)
    if architecture in ("mixtral", "qwen3_moe"):
        # Experts are stored one by one and fused on loading: each comes back in its place and orientation.
        original = load(model, architecture)
        for name, parameter in loaded.named_parameters():
            if "experts" not in name:
                continue
            before_weights = original.get_parameter(name)
            if recipe == "wanda-2:4":
                kept = parameter != 0
                assert (kept.view(*parameter.shape[:2], -1, 4).sum(-1) == 2).all()
                assert torch.equal(parameter[kept], before_weights[kept])
            else:
                error = (parameter - before_weights).square().sum((1, 2)) / before_weights.square().sum((1, 2))
                assert (error < 0.05).all()
                assert (error > 0).all()
    else:
        torch.testing.assert_close(ours, logits(in_memory(model, output, architecture)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_runs_and_loads(llama: Path, tmp_path: Path, recipe: str) -> None:
    run(llama, tmp_path / "out", recipe)
    changed, original = logits(load(tmp_path / "out", "llama")), logits(load(llama, "llama"))
    # Nothing that makes a model forget its weights comes this near: those of other random weights are at 1.4.
    share = 0.5 if any(word in recipe for word in ("2:4", "50", "w2", "2ssp")) else 0.25
    assert 0 < (changed - original).norm() < 2 * share * original.norm()


@pytest.mark.parametrize("scheme", [
    {"bits": 4, "symmetric": False, "group_size": 32}, {"bits": 2, "symmetric": False, "group_size": 16},
    {"bits": 3, "symmetric": True, "group_size": 8}, {"bits": 5, "symmetric": False, "group_size": None},
    {"bits": 8, "symmetric": True, "group_size": None}, {"bits": 4, "symmetric": True, "group_size": 32},
])  # fmt: skip
def test_the_format_library_unpacks_exactly_our_weights(llama: Path, tmp_path: Path, scheme: dict) -> None:
    recipe = cb.Recipe.model_validate(
        {"name": "t", "description": "t", "method": {"name": "rtn"}, "scheme": {"weights": scheme}}
    )
    cb.compress(llama, output=tmp_path / "out", recipe=recipe)
    config = transformers.utils.quantization_config.CompressedTensorsConfig(dequantize=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", quantization_config=config)
    original = load(llama, "llama")
    spec = GridSpec(scheme["bits"], scheme["symmetric"], scheme["group_size"], torch.float32)
    for name, module in original.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in name:
            expected = rtn(module.weight.data, spec).weight
            assert torch.equal(loaded.get_submodule(name).weight, expected), name


@pytest.mark.parametrize("recipe", ["gptq-w4a16-g32", "sparsegpt-2:4", "wanda-2:4", "awq-gptq-w4a16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_command_gives_the_same_bytes(llama: Path, tmp_path: Path, recipe: str, dtype: str) -> None:
    for name in ("a", "b"):
        run(llama, tmp_path / name, recipe, dtype=dtype)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(tmp_path / "b") for p in (tmp_path / "b").rglob("*") if p.is_file())
    for file in files:
        if file.name != "report.json":
            assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


@pytest.mark.parametrize(
    ("architecture", "recipe"),
    [
        *itertools.product(["llama", "gpt2", "mixtral", "bloom"], ["gptq-w4a16-g32", "wanda-2:4", "awq-gptq-w4a16"]),
        ("llama", "smoothquant-w8a8"),
    ],
)
def test_padding_changes_no_weight(model_folder, tmp_path: Path, architecture: str, recipe: str) -> None:
    model = model_folder(architecture)
    plain = random_set(model)
    padding = torch.zeros(8, 16, dtype=torch.int32)
    padded = CalibrationSet.build(
        torch.cat([torch.cat([plain.tokens, padding], 1), torch.zeros(2, 48, dtype=torch.int32)]),
        torch.cat([torch.cat([plain.mask, padding.bool()], 1), torch.zeros(2, 48, dtype=torch.bool)]),
        plain.manifest,
    )
    run(model, tmp_path / "a", recipe, plain)
    run(model, tmp_path / "b", recipe, padded)
    first, second = load_file(tmp_path / "a" / "model.safetensors"), load_file(tmp_path / "b" / "model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_masked_tokens_are_context_but_do_not_count(llama: Path, tmp_path: Path) -> None:
    plain = random_set(llama)
    mask = plain.mask.clone()
    mask[:, :10] = False
    masked = CalibrationSet.build(plain.tokens, mask, plain.manifest)
    report = cb.compress(llama, output=tmp_path / "a", recipe="wanda-2:4", calibration=masked, dtype="float32")
    assert {layer.tokens for layer in report.layers} == {8 * 22}


GROUPS = [
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ["self_attn.o_proj"],
    ["mlp.gate_proj", "mlp.up_proj"],
    ["mlp.down_proj"],
]


def true_sequential(model: Path, made: CalibrationSet) -> dict[str, torch.Tensor]:
    """Wanda 2:4 as plainly as it can be written: the whole model is run again before every group."""
    network = load(model, "llama")
    for block in network.model.layers:
        for group in GROUPS:
            inputs = []
            leader = block.get_submodule(group[0])
            handle = leader.register_forward_pre_hook(lambda module, args, inputs=inputs: inputs.append(args[0]))
            with torch.no_grad():
                network(input_ids=made.tokens.long())
            handle.remove()
            norms = torch.cat(inputs).double().square().sum((0, 1))
            for name in group:
                weight = block.get_submodule(name).weight.data
                scores = (weight.double().abs() * norms.sqrt()).view(-1, 4)
                smallest = torch.argsort(scores, dim=1, stable=True)[:, :2]
                weight.view(-1, 4).scatter_(1, smallest, 0.0)
    return {f"{name}.weight": m.weight for name, m in network.named_modules() if isinstance(m, torch.nn.Linear)}


def test_one_suspended_pass_is_true_sequential_order(llama: Path, tmp_path: Path) -> None:
    made = random_set(llama)
    run(llama, tmp_path / "out", "wanda-2:4", made)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name, expected in true_sequential(llama, made).items():
        if name in stored:
            assert torch.equal(stored[name], expected), name


def test_two_passes_and_no_propagation_are_other_methods(llama: Path, tmp_path: Path) -> None:
    for name, options in {"a": {}, "b": {"order": "two-pass"}, "c": {"order": "independent"}}.items():
        run(llama, tmp_path / name, "gptq-w4a16-g32", **options)
    a, b, c = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    first, last = "model.layers.0.self_attn.q_proj.weight_packed", "model.layers.1.mlp.down_proj.weight_packed"
    assert torch.equal(a[first], b[first])  # the model's first group has the same inputs in every order
    assert torch.equal(b[first], c[first])
    assert not torch.equal(a[last], b[last])
    assert not torch.equal(b[last], c[last])


def test_gptq_beats_rounding_on_the_model_output(llama: Path, tmp_path: Path) -> None:
    errors = {}
    for method in ("gptq", "rtn"):
        recipe = cb.Recipe.model_validate({
            "name": method, "description": "t", "method": {"name": method},
            "scheme": {"weights": {"bits": 3, "group_size": 32}},
        })  # fmt: skip
        made = random_set(llama, samples=64)
        cb.compress(llama, output=tmp_path / method, recipe=recipe, calibration=made, dtype="float32")
        difference = logits(load(tmp_path / method, "llama")) - logits(load(llama, "llama"))
        errors[method] = float(difference.square().mean())
    assert errors["gptq"] < errors["rtn"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoints_keep_their_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    model = write_model(tmp_path / "model", "llama", dtype)
    run(model, tmp_path / "out", "gptq-w4a16-g32")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored["model.layers.0.mlp.up_proj.weight_scale"].dtype == dtype
    assert torch.isfinite(logits(load(tmp_path / "out", "llama"))).all()


@pytest.mark.parametrize("recipe", ["spqr-w4a16-g16", "quantease-w3a16-outliers"])
def test_weights_kept_exactly_are_listed_beside_the_model(tmp_path: Path, recipe: str) -> None:
    """Compressed sparse rows, float32 although the model is not; without them a group has as many values as codes."""
    model = write_model(tmp_path / "model", "llama", torch.bfloat16)
    report = run(model, tmp_path / "out", recipe)
    listed = load_file(tmp_path / "out" / "outliers" / "model.safetensors")
    dense = load_file(tmp_path / "out" / "model.safetensors")
    for layer in report.layers:
        offsets, columns, values = (listed[f"{layer.name}.{part}"] for part in ("row_offsets", "columns", "values"))
        weight = dense[f"{layer.name}.weight"]
        assert offsets[-1] == len(columns) == len(values) == layer.record.outliers
        assert values.dtype is torch.float32
        rows = torch.repeat_interleave(torch.arange(len(weight)), offsets.diff())
        assert torch.equal(weight[rows, columns.long()], values.bfloat16())
        if recipe.startswith("quantease"):  # SpQR's groups are of columns in solving order
            rest = weight.index_put((rows, columns.long()), torch.tensor(torch.nan, dtype=weight.dtype))
            for group in rest.view(-1, 32):
                assert len(group[~group.isnan()].unique()) <= 2**3
    assert sum(layer.record.outliers for layer in report.layers) > 0


@pytest.fixture
def nothing_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Estimates from fixed rates, of a process of a fixed size."""
    for module in (estimate, own_set):
        monkeypatch.setattr(module, "measured_rate", lambda dtype, device: 1e6)
        monkeypatch.setattr(module, "resident_memory", lambda: 1 << 20)
    monkeypatch.setattr(estimate, "best_seconds", lambda work: 1e-3)


def _estimate(llama: Path, tmp_path: Path, recipe: str | Recipe, samples: int = 8) -> estimate.Estimate:
    return prepare(llama, output=tmp_path / "out", recipe=recipe, samples=samples, length=32).estimate()


@pytest.mark.usefixtures("nothing_measured")
def test_the_estimate_counts_what_a_run_does(llama: Path, tmp_path: Path) -> None:
    def seconds(recipe: str | Recipe, samples: int = 8) -> float:
        return _estimate(llama, tmp_path, recipe, samples).seconds

    said = load_recipe("gptq-w4a16").with_weights(None, 32).model_dump()
    scaled = Recipe.model_validate({**said, "transforms": [{"name": "awq"}]})
    assert seconds("rtn-w8a16") == seconds("rtn-w8a16", samples=80)
    assert seconds("rtn-w8a16") < seconds("gptq-w4a16-g32") < seconds(scaled) < seconds(scaled, samples=80)
    least, most = _estimate(llama, tmp_path, scaled).seconds_range
    assert least < seconds(scaled) < most


@pytest.mark.usefixtures("nothing_measured")
def test_the_estimate_counts_the_writing_of_the_set(llama: Path, tmp_path: Path) -> None:
    def found(recipe: str, length: int, calibration: CalibrationSet | None = None) -> estimate.Estimate:
        size = {} if calibration else {"samples": 8, "length": length}
        return prepare(llama, output=tmp_path / "out", recipe=recipe, calibration=calibration, **size).estimate()

    short, long = (found("gptq-w4a16", length) for length in (16, 32))
    assert long.writing_seconds == pytest.approx(2 * short.writing_seconds)
    assert short.seconds_range[0] < short.seconds + short.writing_seconds < short.seconds_range[1]
    given = found("gptq-w4a16", 16, random_set(llama, samples=8, length=16))
    assert given == replace(short, writing_seconds=0, memory_bytes=given.memory_bytes)
    assert found("rtn-w8a16", 16).writing_seconds == 0 < found("zsaq-w4a8", 16).writing_seconds


def test_the_report_times_the_writing_of_the_set(llama: Path, tmp_path: Path) -> None:
    own = cb.compress(llama, output=tmp_path / "own", recipe="wanda-50", samples=4, length=16)
    given = run(llama, tmp_path / "given", "wanda-50")
    assert own.seconds["generate"] > 0
    assert "generate" not in given.seconds


@pytest.mark.usefixtures("nothing_measured")
@pytest.mark.parametrize(
    ("recipe", "bits", "checkpoint_format"),
    [
        ("rtn-w8a16", 8, "compressed-tensors"),
        ("rtn-w8a16", 3, "compressed-tensors"),
        ("rtn-w8a16", 4, "gptq"),
        ("rtn-w8a8", 8, "compressed-tensors"),
        ("magnitude-50", None, "compressed-tensors"),
    ],
)
def test_the_estimate_knows_the_size_of_the_output(
    llama: Path, tmp_path: Path, recipe: str, bits: int | None, checkpoint_format: FormatName
) -> None:
    prepared = prepare(llama, output=tmp_path / "out", recipe=recipe, bits=bits, checkpoint_format=checkpoint_format)
    found, report = prepared.estimate(), prepared.run()
    headers = 200 * report.tensors_verified
    assert abs(found.output_bytes - report.bytes_after) < 0.05 * report.bytes_after + headers
    assert found.disk_bytes == 2 * found.output_bytes


@pytest.mark.usefixtures("nothing_measured")
def test_the_estimate_of_a_training_counts_the_rows_that_run_together(llama: Path, tmp_path: Path) -> None:
    def memory(**training: object) -> float:
        said = load_recipe("zsaq-w4a8").as_written(exclude_none=True)
        said["method"] |= {"length": 32, **training}
        recipe = Recipe.model_validate(said)
        return prepare(llama, output=tmp_path / "out", recipe=recipe, samples=8, length=32).estimate().memory_bytes

    vocabulary, rows = 128, 4096 // 32  # the look's, which are more than a step's eight
    assert memory(micro_batch_size=7) - memory(micro_batch_size=2) == 4 * 6 * 5 * 32 * vocabulary
    assert memory() - memory(micro_batch_size=2) == 4 * 6 * (rows - 2) * 32 * vocabulary


def test_an_expression_that_finds_nothing_is_refused(llama: Path, tmp_path: Path) -> None:
    recipe = load_recipe("rtn-w8a16").model_copy(update={"ignore": ["k_porj"]})
    with pytest.raises(CalibrantError, match="ignore: 'k_porj' is in no module's name"):
        cb.compress(llama, output=tmp_path / "out", recipe=recipe)


def test_the_recipe_can_leave_layers_alone(llama: Path, tmp_path: Path) -> None:
    recipe = load_recipe("gptq-w4a16-g32").model_copy(update={"ignore": ["down_proj$"]})
    cb.compress(llama, output=tmp_path / "out", recipe=recipe, calibration=random_set(llama), dtype="float32")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    original = load_file(llama / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(stored[name], original[name])
    assert torch.isfinite(logits(load(tmp_path / "out", "llama"))).all()


def test_experts_without_tokens_are_solved_without_data_and_listed(model_folder, tmp_path: Path) -> None:
    report = cb.compress(
        model_folder("qwen3_moe"),
        output=tmp_path / "out",
        recipe="gptq-w4a16-g32",
        calibration=random_set(model_folder("qwen3_moe"), samples=1, length=2),
        dtype="float32",
    )
    assert report.fallbacks
    assert all("no calibration token" in str(layer.record.fallback) for layer in report.fallbacks)


@pytest.mark.parametrize("place", ["model", "outliers"])
def test_a_difference_on_disk_fails_the_run(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    from calibrant.formats.shards import ShardWriter

    finish = ShardWriter.finish

    def damaged(self: ShardWriter, folder: Path) -> list[Path]:
        files = finish(self, folder)
        for file in files:
            if (file.parent.name == "outliers") == (place == "outliers"):
                data = bytearray(file.read_bytes())
                data[-1] ^= 1
                file.write_bytes(bytes(data))
        return files

    monkeypatch.setattr(ShardWriter, "finish", damaged)
    with pytest.raises(cb.CalibrantError, match="not what was solved"):
        run(llama, tmp_path / "out", "spqr-w4a16-g16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("recipe", ["gptq-w4a16-g32", "rtn-w8a8"])
def test_codes_that_do_not_unpack_to_what_was_solved_fail_the_run(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    """The file holds what was packed, so its tensors have the right hashes, but packing lost a code."""
    from calibrant.formats.compressed_tensors import IntQuantized, PackQuantized

    for kind in (PackQuantized, IntQuantized):

        def wrong(self, codes, layout, write=kind.write) -> dict[str, torch.Tensor]:
            codes.codes[0, 0] ^= 1
            written = write(self, codes, layout)
            written = {name: tensor.clone() for name, tensor in written.items()}
            codes.codes[0, 0] ^= 1
            return written

        monkeypatch.setattr(kind, "write", wrong)
    with pytest.raises(cb.CalibrantError, match="does not unpack to what was solved"):
        run(llama, tmp_path / "out", recipe)
    assert list(tmp_path.iterdir()) == []


def test_values_that_are_not_finite_name_the_layer(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "llama")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][3] = float("inf")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(cb.CalibrantError, match=r"layers\.1\.self_attn"):
        run(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite_name_the_layer(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "llama")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(cb.CalibrantError, match=r"layers\.1\.mlp\.up_proj: its weights"):
        cb.compress(model, output=tmp_path / "out", recipe="rtn-w8a8")


def test_tensors_that_are_not_compressed_keep_their_bytes(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "llama", torch.bfloat16)
    tensors = load_file(model / "model.safetensors")
    norm = "model.layers.0.input_layernorm.weight"
    tensors[norm] = torch.rand(64) + 0.5  # float32 in a bfloat16 checkpoint
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    run(model, tmp_path / "out", "wanda-2:4")
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[norm], tensors[norm])


def test_experts_can_be_left_alone(model_folder, tmp_path: Path) -> None:
    for expression in ("experts$", "gate_up_proj$|down_proj$"):
        recipe = load_recipe("wanda-2:4").model_copy(update={"ignore": [expression]})
        report = cb.compress(
            model_folder("mixtral"),
            output=tmp_path / expression[:4],
            recipe=recipe,
            calibration=random_set(model_folder("mixtral")),
            dtype="float32",
        )
        assert len(report.layers) == 8
        assert not any("experts" in layer.name for layer in report.layers)


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("scheme", [
    {"weights": {"bits": 4, "group_size": 32}},
    {"weights": {"bits": 8}, "activations": {"dynamic": True}},
])  # fmt: skip
def test_a_model_whose_experts_are_left_alone_loads(
    model_folder, tmp_path: Path, architecture: str, scheme: dict
) -> None:
    """transformers drops experts that lie beside packed layers, so nothing is packed, and it says so."""
    model = model_folder(architecture)
    recipe = {"name": "r", "description": "d", "method": {"name": "gptq"}, "scheme": scheme, "ignore": ["experts"]}
    options = {"calibration": random_set(model), "dtype": "float32"}
    report = cb.compress(model, output=tmp_path / "out", recipe=Recipe.model_validate(recipe), **options)
    assert len(report.layers) == 8
    assert any("mlp.experts" in note and "stored dense" in note for note in report.notes)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    original = transformers.AutoModelForCausalLM.from_pretrained(model)
    alone = "model.layers.1.mlp.experts.down_proj"
    assert torch.equal(loaded.get_parameter(alone), original.get_parameter(alone))
    result = cb.evaluate(tmp_path / "out", against=model, length=32, limit=2)
    assert result.divergence is not None
    assert 0 < result.divergence.kl_mean < 0.1


def test_convolutions_are_no_experts(tmp_path: Path) -> None:
    """A hybrid model: its linears are packed, the weights of its convolutions stay."""
    torch.manual_seed(0)
    kinds = ["conv", "full_attention"]
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.Lfm2Config(
        **sizes, vocab_size=VOCABULARY, layer_types=kinds, num_key_value_heads=2, block_auto_adjust_ff_dim=False
    )
    transformers.Lfm2ForCausalLM(config).save_pretrained(tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    recipe = load_recipe("gptq-w4a16-g32").model_copy(update={"drift_correction": 0.25})
    made = random_set(tmp_path / "model")
    cb.compress(tmp_path / "model", output=tmp_path / "out", recipe=recipe, calibration=made, dtype="float32")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "out"))
    kept = "model.layers.0.conv.conv.weight"
    assert torch.equal(before[kept], after[kept])
    assert {"model.layers.0.conv.in_proj.weight_packed", "model.layers.1.self_attn.q_proj.weight_packed"} <= set(after)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.get_parameter(kept), before[kept])
    result = cb.evaluate(tmp_path / "out", against=tmp_path / "model", length=32, limit=2)
    assert result.divergence is not None
    assert 0 < result.divergence.kl_mean < 0.1


def test_a_model_that_is_initialized_with_its_weights_is_not_packed(tmp_path: Path) -> None:
    """transformers reaches for the weight of Mamba's last linear when it opens a checkpoint; packed ones have none."""
    torch.manual_seed(0)
    config = transformers.MambaConfig(hidden_size=64, num_hidden_layers=2, state_size=8, vocab_size=VOCABULARY)
    transformers.MambaForCausalLM(config).save_pretrained(tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    made = random_set(tmp_path / "model")
    report = cb.compress(
        tmp_path / "model", output=tmp_path / "out", recipe="rtn-w8a16", calibration=made, dtype="float32"
    )
    assert any("mixer.in_proj" in note and "stored dense" in note for note in report.notes)
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_model_that_was_compressed_before_is_known(llama: Path, tmp_path: Path) -> None:
    run(llama, tmp_path / "pruned", "wanda-2:4")
    run(tmp_path / "pruned", tmp_path / "both", "gptq-w4a16-g32")
    record = json.loads((tmp_path / "both" / "calibrant.json").read_text())
    assert record["made_by"]["recipe"] == "wanda-2:4"
    assert record["made_by"]["record_sha256"] == sha256_file(tmp_path / "pruned" / "calibrant.json")
    assert json.loads((tmp_path / "pruned" / "calibrant.json").read_text())["made_by"] is None
    run(llama, tmp_path / "dense", "spqr-w4a16-g16")
    with pytest.raises(cb.CalibrantError, match="spqr-w4a16-g16 quantized the model already"):
        run(tmp_path / "dense", tmp_path / "again", "gptq-w4a16-g32")


@pytest.mark.parametrize("content", ["{}", "[]", "no JSON", '{"recipe": "x"}'])
def test_a_foreign_file_of_the_record_s_name_says_nothing(llama: Path, content: str, tmp_path: Path) -> None:
    model = shutil.copytree(llama, tmp_path / "model")
    (model / "calibrant.json").write_text(content)
    run(model, tmp_path / "out", "rtn-w8a16")
    assert json.loads((tmp_path / "out" / "calibrant.json").read_text())["made_by"] is None
    assert cb.evaluate(model, length=32, limit=2).perplexity.value > 0


def test_the_output_says_what_made_it(llama: Path, tmp_path: Path) -> None:
    made = random_set(llama)
    run(llama, tmp_path / "out", made=made)
    record = json.loads((tmp_path / "out" / "calibrant.json").read_text())
    assert record["calibration"]["set_sha256"] == made.sha256
    assert record["recipe"]["method"]["damping"] == 0.01
    assert CalibrationSet.load(tmp_path / "out" / "calibration").sha256 == made.sha256
    assert len(record["layers"]) == 14
    assert "gptq" in (tmp_path / "out" / "README.md").read_text()
    assert str(tmp_path) not in json.dumps(record)
