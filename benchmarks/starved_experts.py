"""What becomes of experts that the calibration text does not reach?

    python benchmarks/starved_experts.py WORK PROSE OTHER_PROSE [--model demo] [--blocks 30] [--experts 4]

The MLPs of a dense model's first blocks become mixtures: every expert is a copy of the MLP with small random changes,
and the router's weights are cluster centres of what the MLP reads in prose and in program code. So prose reaches some
experts and code others. The mixture is calibrated on prose and compressed by GPTQ with each strategy of recipes
(``experts``), and compared with the mixture itself on windows of prose and of code. The result is written to
``results/starved_experts.json``.
"""

import argparse
import inspect
import json
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from rich.console import Console
from rich.table import Table
from torch import nn

import calibrant as cb
from calibrant.modeling.hub import model_path

RESULT = Path(__file__).parent / "results" / "starved_experts.json"
_NOISE = 0.02
_STRATEGIES: dict[str, dict[str, Any] | None] = {
    "as routed": None,
    "all tokens": {"starved": "all-tokens", "least_tokens": 256},
    "more rows": {"starved": "more-rows", "least_tokens": 256},
}


def code() -> str:
    """Program code: modules of the standard library."""
    return "\n\n".join(inspect.getsource(module) for module in (argparse, inspect, json, shutil))


def centres(states: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Directions of ``count`` clusters of ``states`` ``[n, width]``, by spherical k-means."""
    points = nn.functional.normalize(states - states.mean(0), dim=1)
    found = points[torch.randperm(len(points), generator=generator)[:count]]
    for _ in range(20):
        nearest = (points @ found.T).argmax(1)
        sums = torch.zeros_like(found).index_add_(0, nearest, points)
        found = nn.functional.normalize(sums, dim=1)
    return found


@torch.no_grad()
def write_mixture(model: str, folder: Path, text: dict[str, torch.Tensor], blocks: int, experts: int) -> None:
    """A Mixtral of the first ``blocks`` blocks of a Llama, with the router that ``text`` (token rows) gives."""
    source = model_path(model)
    dense = hf.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    old = dense.config
    config = hf.MixtralConfig(
        **{name: getattr(old, name) for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
            "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "rope_parameters", "bos_token_id",
            "eos_token_id", "pad_token_id",
        )},
        num_hidden_layers=blocks, num_local_experts=experts, num_experts_per_tok=1, sliding_window=None,
        architectures=["MixtralForCausalLM"],
    )  # fmt: skip
    mixture = hf.MixtralForCausalLM(config).float()
    generator = torch.Generator().manual_seed(0)
    seen: dict[int, list[torch.Tensor]] = {index: [] for index in range(blocks)}
    hooks = [
        dense.model.layers[index].mlp.register_forward_pre_hook(
            lambda module, args, index=index: seen[index].append(args[0].flatten(0, 1))
        )
        for index in range(blocks)
    ]
    for rows in text.values():
        for row in rows.split(4):
            dense(row)
    for hook in hooks:
        hook.remove()
    mixture.model.embed_tokens.load_state_dict(dense.model.embed_tokens.state_dict())
    mixture.model.norm.load_state_dict(dense.model.norm.state_dict())
    for index in range(blocks):
        here, there = dense.model.layers[index], mixture.model.layers[index]
        for part in ("self_attn", "input_layernorm", "post_attention_layernorm"):
            getattr(there, part).load_state_dict(getattr(here, part).state_dict())
        gate_up = torch.cat([here.mlp.gate_proj.weight, here.mlp.up_proj.weight])
        down = here.mlp.down_proj.weight
        for expert in range(experts):
            for target, weight in ((there.mlp.experts.gate_up_proj, gate_up), (there.mlp.experts.down_proj, down)):
                noise = torch.randn(weight.shape, generator=generator) * weight.std() * _NOISE
                target[expert].copy_(weight + noise)
        # Only the choice matters with one expert a token, so scores may be sharp.
        there.mlp.gate.weight.copy_(20 * centres(torch.cat(seen[index]), experts, generator))
    mixture.to(torch.bfloat16).save_pretrained(folder)
    for file in source.iterdir():
        if "token" in file.name or file.name in ("vocab.json", "merges.txt"):
            shutil.copy(file, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder to write to, which must not exist")
    parser.add_argument("--model", default="demo")
    parser.add_argument("prose", help="corpus of prose to calibrate on")
    parser.add_argument("other_prose", help="prose to measure on")
    parser.add_argument("--blocks", type=int, default=30)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--draws", type=int, default=3)
    options = parser.parse_args()
    work = options.work
    work.mkdir(parents=True)
    (work / "code.txt").write_text(code(), encoding="utf-8")
    size = {"tokenizer": options.model, "length": 256}
    routed = {
        "prose": cb.select(options.prose, samples=16, seed=7, **size).tokens.long(),
        "code": cb.select(work / "code.txt", samples=16, seed=7, **size).tokens.long(),
    }
    mixture = work / "mixture"
    write_mixture(options.model, mixture, routed, options.blocks, options.experts)
    table = Table("calibrated on prose", "draw", "few tokens", "rows", "KL prose", "KL code")
    runs = []
    recipe = cb.load_recipe("gptq-w4a16").with_weights(3, 64)
    for draw in range(options.draws):
        prose = cb.select(options.prose, samples=32, seed=1, draw=draw, **size)
        for name, experts in _STRATEGIES.items():
            chosen = cb.Recipe.model_validate({**recipe.model_dump(), "experts": experts})
            report = cb.compress(
                mixture, output=work / "out", recipe=chosen, calibration=prose, seed=draw, overwrite=True
            )
            few = {layer.name for layer in report.layers if "gate_up" in layer.name and _routed(layer) < 256}
            found = {
                text: cb.evaluate(work / "out", against=mixture, text=corpus, length=256, limit=32)
                for text, corpus in (("prose", options.other_prose), ("code", work / "code.txt"))
            }
            run = {
                "strategy": name,
                "draw": draw,
                "experts_with_few_tokens": len(few),
                "rows": len(cb.CalibrationSet.load(work / "out" / "calibration").tokens),
                **{f"kl_{text}": one.divergence.kl_mean for text, one in found.items()},
                **{f"kl_{text}_error": one.divergence.kl_standard_error for text, one in found.items()},
                "notes": [note for note in report.notes if "experts" in note],
            }
            runs.append(run)
            Console().print(run)
            numbers = (run["kl_prose"], run["kl_code"])
            table.add_row(name, str(draw), str(len(few)), str(run["rows"]), *(f"{one:.4f}" for one in numbers))
    Console().print(table)
    settings = {"blocks": options.blocks, "experts": options.experts, "bits": 3, "noise": _NOISE}
    versions = {"calibrant": cb.__version__, "torch": torch.__version__, "transformers": hf.__version__}
    result = {"date": datetime.now(UTC).date().isoformat(), "versions": versions, "settings": settings, "runs": runs}
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _routed(layer: cb.LayerReport) -> int:
    return layer.tokens if layer.routed is None else layer.routed


if __name__ == "__main__":
    main()
