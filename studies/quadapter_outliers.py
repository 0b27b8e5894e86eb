"""Planted outlier channels: what static W8A8 loses to them, and what Quadapter's first phase brings back.

    python studies/quadapter_outliers.py MODEL --corpus c4.utf8.gz --text wiki.test.raw.gz

Some channels behind every norm are made larger by a known factor and the linears' columns smaller by the same, so the
function is as before; then the model is quantized by round-to-nearest, by SmoothQuant and by Quadapter. Norms must be
of the kind whose gain is their weight (Llama's), and the model stored in one file.
"""

import argparse
import json
import math
import platform
import shutil
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

import calibrant as cb
from calibrant.compression.recipe import Recipe

HERE = Path(__file__).parent
BEHIND = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
TRANSFORMS: dict[str, list[dict[str, Any]]] = {
    "round-to-nearest": [],
    "SmoothQuant": [{"name": "smoothquant", "alpha": 0.5}],
}


def plant(model: Path, folder: Path, channels: int, factor: float) -> dict[str, list[int]]:
    """A copy of ``model`` with outliers; returns the channels behind each norm."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    planted = {}
    for name in sorted(tensors):
        block, _, norm = name.removesuffix(".weight").rpartition(".")
        if norm not in BEHIND:
            continue
        chosen = torch.randperm(len(tensors[name]), generator=generator)[:channels]
        tensors[name][chosen] *= factor
        for linear in BEHIND[norm]:
            tensors[f"{block}.{linear}.weight"][:, chosen] /= factor
        planted[name] = sorted(chosen.tolist())
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return planted


def found_share(planted: dict[str, list[int]], before: Path, after: Path) -> float:
    """The share of planted channels among as many whose scale fell most."""
    first, second = load_file(before / "model.safetensors"), load_file(after / "model.safetensors")
    hits = 0
    for name, channels in planted.items():
        alpha = second[name].float() / first[name].float()
        hits += len(set(alpha.argsort()[: len(channels)].tolist()) & set(channels))
    return hits / sum(map(len, planted.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--channels", type=int, default=4)
    parser.add_argument("--factor", type=float, default=32.0)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=0.06)
    parser.add_argument("--draws", type=int, default=1, help="calibration sets")
    options = parser.parse_args()
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        harmed = Path(name) / "harmed"
        planted = plant(options.model, harmed, options.channels, options.factor)
        original = cb.evaluate(harmed, text=options.text, length=512, limit=options.windows).perplexity.value
        for draw in range(options.draws):
            data = cb.select(options.corpus, tokenizer=options.model, samples=options.samples, length=512, draw=draw)
            quadapter = {"name": "quadapter", "steps": options.steps, "learning_rate": options.learning_rate}
            for label, transforms in {**TRANSFORMS, "Quadapter": [quadapter]}.items():
                scheme = {"weights": {"bits": 8}, "activations": {"bits": 8, "dynamic": False}}
                recipe = Recipe.model_validate(
                    {"name": "study", "description": label, "transforms": transforms, "scheme": scheme}
                    | {"method": {"name": "rtn"}}
                )
                output = Path(name) / "out"
                report = cb.compress(harmed, output=output, recipe=recipe, calibration=data, overwrite=True)
                result = cb.evaluate(output, against=harmed, text=options.text, length=512, limit=options.windows)
                assert result.divergence is not None
                runs.append(
                    {
                        "method": label,
                        "draw": draw,
                        "perplexity": result.perplexity.value,
                        "kl_mean": result.divergence.kl_mean,
                        "kl_standard_error": result.divergence.kl_standard_error,
                        "planted_found": found_share(planted, harmed, output) if transforms else None,
                        "seconds": sum(report.seconds.values()),
                    }
                )
                print(runs[-1], flush=True)
    table = Table("method", "draw", "perplexity", "log loss brought back", "KL", "planted found", "s")
    for run in runs:
        plain = next(one for one in runs if one["draw"] == run["draw"] and not one["planted_found"])
        lost = math.log(plain["perplexity"] / original)
        run["log_loss_recovered"] = 1 - math.log(run["perplexity"] / original) / lost
        found = "" if run["planted_found"] is None else f"{run['planted_found']:.0%}"
        error = f"{run['kl_mean']:.4f} ± {run['kl_standard_error']:.4f}"
        shown = (f"{run['perplexity']:.2f}", f"{run['log_loss_recovered']:.1%}", error, found, f"{run['seconds']:.0f}")
        table.add_row(run["method"], str(run["draw"]), *shown)
    Console(width=120).print(f"perplexity of the original: {original:.2f}", table)
    settings = {"model": options.model.resolve().name, "channels": options.channels, "factor": options.factor}
    settings |= {"samples": options.samples, "windows": options.windows}
    settings |= {"steps": options.steps, "learning_rate": options.learning_rate}
    found = {"date": datetime.now(UTC).date().isoformat(), "system": platform.platform(), "settings": settings}
    file = HERE / "results" / "quadapter_outliers.json"
    file.write_text(json.dumps({**found, "original_perplexity": original, "runs": runs}, indent=2) + "\n")


if __name__ == "__main__":
    main()
