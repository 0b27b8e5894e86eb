"""Our checkpoints in other people's loaders: are the logits those of the weights that we meant to write?

    python benchmarks/loaders.py MODEL

Each format is written from one calibration set and loaded by its own reader: compressed-tensors (weight-only at every
width, of several widths, asymmetric; int8 inputs with ranges found at run time and fixed) by transformers, GPTQ and AWQ
by GPTQModel in its own environment. They are held against the same weights as plain tensors in a plain model, whose
inputs are rounded by the rule of the scheme. GPTQModel computes in float16 here, so its difference is given beside
that of the plain model in float16.
"""

import argparse
import json
import platform
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

import calibrant as cb
from calibrant.formats.compressed_tensors import IntQuantized, PackQuantized
from calibrant.formats.quantized import Layout
from calibrant.formats.stored_codes import dense_weights
from calibrant.modeling.input_rounding import apply_input_rounding
from calibrant.recipes.recipe import Recipe
from compress import HERE, peer_python, pinned_versions

WEIGHTS = {"bits": 4, "group_size": "auto"}
ASYMMETRIC = {**WEIGHTS, "symmetric": False}
INT8 = {"bits": 8}
RTN, GPTQ = {"name": "rtn"}, {"name": "gptq"}
UNPACKED = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)}
# By what it is: the recipe, our --format, the loader's settings or GPTQModel's backend.
CASES: dict[str, tuple[dict[str, Any], str, Any]] = {
    **{
        f"pack-quantized, {bits} bits": (
            {"method": RTN, "scheme": {"weights": {**WEIGHTS, "bits": bits}}},
            "compressed-tensors",
            {},
        )
        for bits in (2, 3, 4, 8)
    },
    "pack-quantized, 2, 4 and 8 bits": (
        {"method": GPTQ, "scheme": {"weights": WEIGHTS}, "budget": {"choices": [2, 4, 8]}},
        "compressed-tensors",
        {},
    ),
    "pack-quantized, asymmetric": (
        {"method": RTN, "scheme": {"weights": ASYMMETRIC}},
        "compressed-tensors",
        UNPACKED,
    ),
    "int-quantized, weights alone": (
        {"method": RTN, "scheme": {"weights": INT8, "activations": {"dynamic": True}}},
        "compressed-tensors",
        UNPACKED,
    ),
    "int-quantized, ranges at run time": (
        {"method": RTN, "scheme": {"weights": INT8, "activations": {"dynamic": True}}},
        "compressed-tensors",
        {},
    ),
    "int-quantized, fixed ranges": (
        {"method": RTN, "scheme": {"weights": INT8, "activations": {"dynamic": False}}},
        "compressed-tensors",
        {},
    ),
    **{
        f"gptq, {bits} bits": ({"method": RTN, "scheme": {"weights": {**WEIGHTS, "bits": bits}}}, "gptq", "GPTQ_TORCH")
        for bits in (2, 3, 4, 8)
    },
    "awq, 4 bits": ({"method": RTN, "scheme": {"weights": ASYMMETRIC}}, "awq", "AWQ_TORCH"),
}


@dataclass(frozen=True)
class Loaded:
    """Largest differences of logits from the plain model in float32: the loader's, and its own in float16."""

    loader: str
    difference: float
    rounding: float
    largest_logit: float
    same_top: float


def logits_of(folder: Path, tokens: torch.Tensor, dtype: torch.dtype, **settings: Any) -> torch.Tensor:
    """By transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **settings).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(tokens).logits.float()
    return logits


def decoded(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of quantized layers, ``[out, in]`` float32, by our own reading of the file."""
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    tensors = load_file(folder / "model.safetensors")
    if settings["quant_method"] != "compressed-tensors":
        dense = dense_weights(tensors, tensors.__getitem__, settings)
        return {name: value.float() for name, value in dense.items() if name not in tensors}
    groups = settings["config_groups"].values()
    reader = PackQuantized() if settings["format"] == "pack-quantized" else IntQuantized()
    found = {}
    for name in tensors:
        base, _, suffix = name.rpartition(".")
        if suffix == "weight_scale":
            weights = next(one["weights"] for one in groups if {"Linear", base} & set(one["targets"]))
            layout = Layout(weights["num_bits"], weights["symmetric"], weights.get("group_size"))
            own = {key.removeprefix(f"{base}."): value for key, value in tensors.items() if key.startswith(f"{base}.")}
            codes = reader.read(own, layout)
            values = codes.codes.view(*codes.scale.shape, -1).float() - codes.zero_point.float()[..., None]
            found[f"{base}.weight"] = (values * codes.scale.float()[..., None]).flatten(1)
    return found


def input_grids(folder: Path) -> dict[str, tuple[float, int] | None]:
    """By linear whose inputs are rounded: scale and zero point, None if they are found at run time."""
    tensors = load_file(folder / "model.safetensors")
    names = [name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")]
    if f"{names[0]}.input_scale" not in tensors:
        return dict.fromkeys(names)
    return {
        name: (tensors[f"{name}.input_scale"].item(), int(tensors[f"{name}.input_zero_point"].item())) for name in names
    }


def plain(folder: Path, original: Path, tokens: torch.Tensor, dtype: torch.dtype, rounds_inputs: bool) -> torch.Tensor:
    """Logits of ``original`` as a plain model with the quantized layers' weights put in place."""
    model = transformers.AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32).eval()
    for name, value in decoded(folder).items():
        model.get_parameter(name).data = value
    if rounds_inputs:
        apply_input_rounding(model, input_grids(folder))
    with torch.no_grad():
        logits: torch.Tensor = model.to(dtype)(tokens).logits.float()
    return logits


def check(case: str, options: argparse.Namespace, calibration: Path, folder: Path) -> Loaded:
    """Write, load, compare."""
    said, checkpoint_format, loader = CASES[case]
    recipe = Recipe.model_validate({"name": case, "description": case, **said})
    output = folder / checkpoint_format
    cb.compress(
        options.model,
        output=output,
        recipe=recipe,
        calibration=calibration,
        checkpoint_format=checkpoint_format,
        overwrite=True,
    )
    tokens = load_file(calibration / "tokens.safetensors")["tokens"][:1, :128].long()
    rounds_inputs = recipe.scheme.activations is not None and loader is not UNPACKED
    expected = plain(output, options.model, tokens, torch.float32, rounds_inputs)
    rounded = plain(output, options.model, tokens, torch.float16, rounds_inputs)
    if isinstance(loader, str):
        save_file({"tokens": tokens}, folder / "tokens.safetensors")
        script, found_file = HERE / "peers" / "gptqmodel" / "load.py", folder / "logits.safetensors"
        command = [peer_python("gptqmodel"), script, output, folder / "tokens.safetensors", found_file, loader]
        subprocess.run(list(map(str, command)), check=True, capture_output=True)
        found = load_file(found_file)["logits"]
    else:
        found = logits_of(output, tokens, torch.float32, **loader)
    return Loaded(
        f"GPTQModel {loader}, float16" if isinstance(loader, str) else "transformers, float32",
        float((found - expected).abs().max()),
        float((rounded - expected).abs().max()),
        float(expected.abs().max()),
        float((found.argmax(-1) == expected.argmax(-1)).float().mean()),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="model folder")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "loaders.json")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    table = Table("format", "loader", "largest difference", "float16's own", "largest logit", "same top")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        calibration = Path(folder) / "set"
        cb.select("builtin", tokenizer=options.model, samples=4, length=128).save(calibration)
        for case in CASES:
            one = found[case] = check(case, options, calibration, Path(folder))
            numbers = (one.difference, one.rounding, one.largest_logit, one.same_top)
            table.add_row(case, one.loader, *(f"{number:.4g}" for number in numbers))
    Console(width=140).print(table)
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "system": platform.platform(),
        "versions": pinned_versions(),
        "model": options.model.resolve().name,
        "formats": {case: asdict(one) for case, one in found.items()},
    }
    options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
