"""Every method on one model with one calibration set: what it costs in bits, and what it does to the model.

    python benchmarks/methods.py MODEL --corpus c4.utf8.gz --text wiki.test.raw.gz --bits 4 3 2

Groups are as large as the model allows of 128, 64 and 32, the same for all. Each run is a process of its own. The JSON
holds every run, the machine and the date; finished runs are kept, so that a stopped benchmark goes on where it was.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table

import calibrant as cb

HERE = Path(__file__).parent
AWQ = {"transforms": [{"name": "awq"}]}
SMOOTHQUANT = {"transforms": [{"name": "smoothquant", "alpha": 0.8}]}
GPTQ = {"method": {"name": "gptq"}}
REFINED = {"method": {"name": "gptq", "refine_sweeps": 10}}
REFITTED = {"method": {"name": "gptq", "refine_sweeps": 2, "scale_refits": 2}}
DAMPED = {"method": {"name": "gptq", "damping": 0.1, "refine_sweeps": 2, "scale_refits": 2}, "drift_correction": 0.5}
SEARCHED = {"method": {"name": "sparsegpt", "refine_sweeps": 10}, "drift_correction": 0.5}
# By label: what the recipe says beyond the scheme, and what its weights say beyond bits and groups.
QUANTIZERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rtn": ({"method": {"name": "rtn"}}, {}),
    "rtn, mse": ({"method": {"name": "rtn"}}, {"range_search": "mse"}),
    "rtn, importance": ({"method": {"name": "rtn"}}, {"range_search": "importance"}),
    "rtn, clip": ({"method": {"name": "rtn"}}, {"range_search": "clip"}),
    "hqq": ({"method": {"name": "hqq"}}, {"symmetric": False}),
    "adpq": ({"method": {"name": "adpq"}}, {}),
    "awq": ({**AWQ, "method": {"name": "rtn"}}, {"range_search": "clip"}),
    "awq, no clip": ({**AWQ, "method": {"name": "rtn"}}, {}),
    "awq, duo": ({"transforms": [{"name": "awq", "duo": True}], "method": {"name": "rtn"}}, {"range_search": "clip"}),
    "gptq": (GPTQ, {}),
    "gptq, clip": (GPTQ, {"range_search": "clip"}),
    "gptq, refined": (REFINED, {}),
    "gptq, clip, refined": (REFINED, {"range_search": "clip"}),
    "quantease": ({"method": {"name": "quantease"}}, {}),
    "quantease, damped": ({"method": {"name": "quantease", "damping": 0.01}}, {}),
    "quantease, outliers": ({"method": {"name": "quantease", "outliers": 0.01}}, {}),
    "spqr": ({"method": {"name": "spqr"}}, {"symmetric": False, "group_size": 16}),
    "awq, gptq, clip": ({**AWQ, **GPTQ}, {"range_search": "clip"}),
    "gptq, drift corrected": ({**GPTQ, "drift_correction": 1.0}, {}),
    "gptq, clip, drift corrected by a quarter": ({**GPTQ, "drift_correction": 0.25}, {"range_search": "clip"}),
    "gptq, clip, refined, drift corrected by a quarter": (
        {**REFINED, "drift_correction": 0.25},
        {"range_search": "clip"},
    ),
    "gptq, signed clip, refined, drift corrected by a quarter": (
        {**REFINED, "drift_correction": 0.25},
        {"range_search": "clip", "signed_scales": True},
    ),
    "gptq, clip, scales refitted, drift corrected by a quarter": (
        {**REFITTED, "drift_correction": 0.25},
        {"range_search": "clip"},
    ),
    "gptq, signed clip, scales refitted, drift corrected by a quarter": (
        {**REFITTED, "drift_correction": 0.25},
        {"range_search": "clip", "signed_scales": True},
    ),
    "gptq, signed clip, scales refitted, damped, drift corrected by half": (
        DAMPED,
        {"range_search": "clip", "signed_scales": True},
    ),
    "gptq, signed clip, scales refitted, damped, drift corrected by half, reconstructed": (
        {**DAMPED, "reconstruction": {}},
        {"range_search": "clip", "signed_scales": True},
    ),
    "gptq, signed clip, scales refitted, damped, drift corrected by half, distilled": (
        {**DAMPED, "distillation": {}},
        {"range_search": "clip", "signed_scales": True},
    ),
    "awq, gptq, clip, refined": ({**AWQ, **REFINED}, {"range_search": "clip"}),
    "awq, gptq, clip, refined, drift corrected by a quarter": (
        {**AWQ, **REFINED, "drift_correction": 0.25},
        {"range_search": "clip"},
    ),
}
PRUNERS: dict[str, dict[str, Any]] = {
    "magnitude": {"method": {"name": "magnitude"}},
    "wanda": {"method": {"name": "wanda"}},
    "sparsegpt": {"method": {"name": "sparsegpt"}},
    "sparsegpt, drift corrected": {"method": {"name": "sparsegpt"}, "drift_correction": 1.0},
    "sparsegpt, drift corrected by a quarter": {"method": {"name": "sparsegpt"}, "drift_correction": 0.25},
    "sparsegpt, refined, drift corrected by half": SEARCHED,
    "sparsegpt, refined, drift corrected by half, reconstructed": {
        **SEARCHED,
        "reconstruction": {"epochs": 4, "step_tokens": 2048, "learning_rate": 0.03},
    },
    "sparsegpt, refined, drift corrected by half, distilled": {**SEARCHED, "distillation": {}},
}
DYNAMIC, MINMAX = {"dynamic": True}, {"dynamic": False}
# By label: what the recipe says beyond the scheme, and its activations.
INT8: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rtn": ({"method": {"name": "rtn"}}, DYNAMIC),
    "gptq": (GPTQ, DYNAMIC),
    "smoothquant, rtn": ({**SMOOTHQUANT, "method": {"name": "rtn"}}, DYNAMIC),
    "smoothquant, gptq": ({**SMOOTHQUANT, **GPTQ}, DYNAMIC),
    "rtn, static": ({"method": {"name": "rtn"}}, MINMAX),
    "rtn, static by percentile": ({"method": {"name": "rtn"}}, {**MINMAX, "range": "percentile"}),
    "rtn, static by mse": ({"method": {"name": "rtn"}}, {**MINMAX, "range": "mse"}),
    "smoothquant, rtn, static": ({**SMOOTHQUANT, "method": {"name": "rtn"}}, MINMAX),
}
# By target and label: recipes of one strength.
OTHERS: dict[str, dict[str, Any]] = {
    "4 bit: gptq, clip, budget of 2, 4, 8": {
        **GPTQ,
        "scheme": {"weights": {"bits": 4, "group_size": "auto", "range_search": "clip"}},
        "budget": {"choices": [2, 4, 8]},
    },
    "0.5: sparsegpt, budget": {
        "method": {"name": "sparsegpt"},
        "scheme": {"sparsity": "0.5"},
        "budget": {"choices": [0.3, 0.4, 0.5, 0.6, 0.7]},
    },
    "2:4 and 4 bit: sparsegpt": {
        "method": {"name": "sparsegpt"},
        "scheme": {"sparsity": "2:4", "weights": {"bits": 4, "group_size": "auto"}},
    },
    "a quarter smaller: 2ssp": {"method": {"name": "2ssp"}, "scheme": {"sparsity": "0.25"}},
}


def recipes(bits: list[int], sparsity: list[str], int8: bool) -> dict[str, dict[str, Any]]:
    """Recipes by label, as a file would hold them."""
    found: dict[str, dict[str, Any]] = {}
    for width in bits:
        for label, (recipe, weights) in QUANTIZERS.items():
            scheme = {"weights": {"bits": width, "group_size": "auto", **weights}}
            found[f"{width} bit: {label}"] = {**recipe, "scheme": scheme}
    for pattern in sparsity:
        for label, recipe in PRUNERS.items():
            found[f"{pattern}: {label}"] = {**recipe, "scheme": {"sparsity": pattern}}
    for label, (recipe, activations) in INT8.items() if int8 else ():
        found[f"W8A8: {label}"] = {**recipe, "scheme": {"weights": {"bits": 8}, "activations": activations}}
    found |= OTHERS
    return {label: {"name": "benchmark", "description": label, **recipe} for label, recipe in found.items()}


def bits_per_weight(record: dict[str, Any]) -> float:
    """Bits of a weight with its share of scales, zeros and exact outliers (16 bits of value, 16 of place)."""
    recipe, layers = record["recipe"], record["layers"]
    if record["structure"] is not None:
        return 16 * (1 - record["structure"]["share"])
    weights, method = recipe["scheme"]["weights"], recipe["method"]
    elements = sum(layer["elements"] for layer in layers)
    if weights is None:
        return 16 * (1 - sum(layer["zeros"] for layer in layers) / elements)
    # One scale a row costs next to nothing.
    group = weights["group_size"] or 10**6
    outliers = 32 * sum(layer["record"]["outliers"] for layer in layers) / elements
    if method["name"] == "spqr":
        return weights["bits"] + 6 / group + 64 / (16 * group) + outliers
    if method["name"] == "adpq":
        return weights["bits"] + 2 * 16 / group + outliers / 2
    zero = 16 if method["name"] == "hqq" else 0 if weights["symmetric"] else weights["bits"]
    bits = record["budget"]["average"] if record["budget"] is not None else weights["bits"]
    return bits + (16 + zero) / group + outliers


def measure(model: Path, recipe: Path, calibration: Path, text: Path, windows: int) -> dict[str, Any]:
    """One run, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out"
        begin = time.perf_counter()
        report = cb.compress(model, output=output, recipe=recipe, calibration=calibration)
        seconds = time.perf_counter() - begin
        record = json.loads((output / "calibrant.json").read_text())
        result = cb.evaluate(output, against=model, text=text, length=512, limit=windows)
    assert result.divergence is not None
    errors = [layer["relative_error"] for layer in record["layers"]]  # none of models made narrower
    return {
        "bits_per_weight": bits_per_weight(record),
        "kl_mean": result.divergence.kl_mean,
        "kl_standard_error": result.divergence.kl_standard_error,
        "perplexity": result.perplexity.value,
        "layer_error": sum(errors) / len(errors) if errors else None,
        "layer_error_measure": record["layers"][0]["measure"] if errors else "",
        "seconds": seconds,
        "peak_memory_bytes": report.peak_memory_bytes,
    }


def in_own_process(options: argparse.Namespace, recipe: dict[str, Any], calibration: Path) -> dict[str, Any]:
    """``measure`` in a new process, whose memory is its own."""
    file = calibration.parent / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    arguments = [options.model, file, calibration, options.text, options.windows]
    command = [sys.executable, __file__, "--one", *map(str, arguments)]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def where_and_when() -> dict[str, str]:
    """The machine and the date."""
    return {"system": platform.platform(), "date": datetime.now(UTC).date().isoformat()}


def show(found: dict[str, dict[str, Any]]) -> None:
    """The table, best KL first within each target."""
    table = Table("target", "method", "bits", "KL", "perplexity", "layer error", "of", "s", "MB")
    for label, one in sorted(found.items(), key=lambda item: (item[0].split(":")[0], item[1]["kl_mean"])):
        target, _, method = label.rpartition(": ")
        table.add_row(
            target,
            method,
            f"{one['bits_per_weight']:.2f}",
            f"{one['kl_mean']:.4f} ± {one['kl_standard_error']:.4f}",
            f"{one['perplexity']:.2f}",
            f"{one['layer_error']:.4f}" if one["layer_error"] is not None else "",
            one["layer_error_measure"],
            f"{one['seconds']:.0f}",
            f"{one['peak_memory_bytes'] / 1e6:.0f}",
        )
    Console(width=140).print(table)


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        model, recipe, calibration, text, windows = sys.argv[2:]
        print(json.dumps(measure(Path(model), Path(recipe), Path(calibration), Path(text), int(windows))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--draw", type=int, default=0)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--bits", type=int, nargs="*", default=[4, 3, 2])
    parser.add_argument("--sparsity", nargs="*", default=["0.5", "2:4"])
    parser.add_argument("--no-int8", action="store_true")
    parser.add_argument("--only", nargs="*", help="run these labels alone")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    file = options.json or HERE / "results" / f"methods_{options.model.resolve().name}.json"
    settings = {
        "model": options.model.resolve().name,
        "corpus": options.corpus.name,
        "text": options.text.name,
        "samples": options.samples,
        **({"draw": options.draw} if options.draw else {}),  # older results have none
        "length": 512,
        "windows": options.windows,
        "torch": torch.__version__,
    }
    known = json.loads(file.read_text()) if file.exists() else {}
    found = known.get("runs", {}) if known.get("settings") == settings else {}
    with tempfile.TemporaryDirectory() as folder:
        calibration = Path(folder) / "set"
        size = {"samples": options.samples, "length": 512, "draw": options.draw}
        cb.select(options.corpus, tokenizer=options.model, **size).save(calibration)
        for label, recipe in recipes(options.bits, options.sparsity, not options.no_int8).items():
            if label in found or (options.only and label not in options.only):
                continue
            found[label] = in_own_process(options, recipe, calibration)
            print(f"{label}: KL {found[label]['kl_mean']:.4f}, {found[label]['seconds']:.0f} s", flush=True)
            file.write_text(json.dumps({**where_and_when(), "settings": settings, "runs": found}, indent=2) + "\n")
    show(found)


if __name__ == "__main__":
    main()
