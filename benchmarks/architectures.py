"""Which architectures of transformers are compressed, and does the result compute what it stores?

    python benchmarks/architectures.py [MODEL_TYPE ...]

Every language model of the installed transformers, with ``--multimodal`` every one that takes images or sounds too, is
made with a tiny configuration and random weights, compressed by GPTQ (4 bits), to 8 bits, to W8A8 and by Wanda on
random tokens in float32, and loaded again by transformers. Checked are: the hidden states of the block walk against the
model's own; the logits of packed outputs against a plain model with the decoded weights, whose inputs are rounded; the
logits at 8 bits against those of the original; the zeros of the pruned model. Each architecture runs in a process of
its own, so that nothing stops the others.
"""

import argparse
import json
import math
import multiprocessing
import os
import platform
import tempfile
import time
import traceback
import warnings
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numba
import torch
import transformers
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer as Backend
from tokenizers import models as token_models
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

import calibrant as cb
from calibrant.calibration.calibration_set import CalibrationSet, Manifest
from calibrant.modeling.block_walk import BlockWalk
from calibrant.modeling.checkpoint import ModelFolder
from calibrant.modeling.dequantized_model import load_dequantized
from calibrant.modeling.find_blocks import find_blocks
from calibrant.modeling.input_rounding import round_inputs
from calibrant.modeling.lazy_model import LazyModel
from calibrant.modeling.quietly import quietly
from calibrant.modeling.token_rows import TokenRows
from calibrant.modeling.whole_model import load_whole
from calibrant.progress import NoProgress
from calibrant.recipes.plan import LayerPlan
from calibrant.recipes.recipe import Recipe
from compress import HERE, pinned_versions
from tiny_configs import tiny_config

SECONDS = 120
TOKENS = torch.randint(3, 250, (8, 32), generator=torch.Generator().manual_seed(0))
# What rounding to 8 bits may change: the relative distance of logits of half of the tokens (routers may choose another
# expert for some).
CLOSE = 0.1
# What computing the same in another order may change.
EQUAL = 1e-4


@dataclass
class Outcome:
    """What came of one architecture; ``result`` is what stopped it, or "works".

    ``share`` is the share of the blocks' weights that is compressed, ``size`` the bits on disk of each of these, scales
    included; ``walk``, ``bfloat16``, ``logits``, ``eight_bits`` and ``w8a8`` are relative distances: of the walked
    hidden states in float32 and in bfloat16, of the loaded output, of its logits at 8 bits, and of the output with int8
    inputs; ``zeros`` is Wanda's share of them.
    """

    architecture: str
    model_type: str
    result: str = "process ended"
    detail: str = ""
    blocks: int = 0
    share: float | None = None
    stored: str = ""
    walk: float | None = None
    bfloat16: float | None = None
    logits: float | None = None
    eight_bits: float | None = None
    size: float | None = None
    w8a8: float | None = None
    w8a8_refused: str = ""
    zeros: float | None = None


def recipe(bits: int, method: str) -> Recipe:
    scheme = {"weights": {"bits": bits, "group_size": "auto"}}
    return Recipe.model_validate({"name": method, "description": method, "method": {"name": method}, "scheme": scheme})


W8A8 = Recipe.model_validate({
    "name": "w8a8", "description": "w8a8", "method": {"name": "rtn"},
    "scheme": {"weights": {"bits": 8}, "activations": {"dynamic": True}},
})  # fmt: skip


def random_set() -> CalibrationSet:
    rows, length = TOKENS.shape
    manifest = Manifest(
        strategy="random", parameters={}, seed=0, draw=0, samples=rows, length=length, tokenizer_sha256=""
    )
    return CalibrationSet.build(TOKENS, torch.ones_like(TOKENS, dtype=torch.bool), manifest)


def median_distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float(((found - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp(min=1e-12)).median())


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-12))


def tiny_model(architecture: str, model_type: str) -> transformers.PreTrainedModel:
    """Random weights that matter: matrices keep the scale of what passes through them."""
    kind = getattr(transformers, architecture)
    config = tiny_config(model_type)
    if not isinstance(config, kind.config_class):
        config = config.get_text_config(decoder=True)
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model: transformers.PreTrainedModel = kind._from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "conv" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
            elif name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 10)
    return model


def write_tokenizer(folder: Path) -> None:
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{number}": number for number in range(3, 250)}}
    backend = Backend(token_models.WordLevel(words, unk_token="<unk>"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(folder)


def logits_of(folder: Path, architecture: str, **settings: Any) -> torch.Tensor:
    """By transformers, from the folder; a parameter that the files lack is an error."""
    load = getattr(transformers, architecture).from_pretrained
    model, found = load(folder, dtype=torch.float32, output_loading_info=True, **settings)
    if found["missing_keys"]:
        raise RuntimeError(f"missing {sorted(found['missing_keys'])[0]}")
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=TOKENS[:2], use_cache=False).logits
    return logits


def walk_distance(folder: Path, architecture: str, dtype: torch.dtype = torch.float32) -> float:
    """Of the hidden states that the block walk computes in ``dtype`` from those of the model, after the last block.

    In bfloat16 that of half of the tokens, since routers may choose another expert for some.
    """
    lazy = LazyModel(ModelFolder(folder), torch.float32, torch.device("cpu"), computes=dtype)
    blocks = find_blocks(lazy.module)
    with torch.inference_mode():
        walk = BlockWalk(lazy, blocks, TokenRows(TOKENS[:2], torch.ones(2, 32, dtype=torch.bool)), dtype)
        for block in walk.visit("walking", NoProgress()):
            block.advance()
    captured: list[Any] = []
    model = getattr(transformers, architecture).from_pretrained(folder, dtype=dtype).eval()
    model.get_submodule(blocks[-1]).register_forward_hook(lambda module, args, output: captured.append(output))
    with torch.no_grad():
        model(input_ids=TOKENS[:2], use_cache=False)
    last = captured[0][0] if isinstance(captured[0], tuple | list) else captured[0]
    found, last = walk.batches[0].hidden.float(), last.float()
    return distance(found, last) if dtype is torch.float32 else median_distance(found, last)


def decoded_logits(output: Path) -> torch.Tensor:
    """Of a plain model with the weights that the stored codes stand for, by our own reading."""
    folder = ModelFolder(output, allow_quantized=True)
    model = load_dequantized(folder, torch.device("cpu"), torch.float32)
    round_inputs(model, folder)
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=TOKENS[:2], use_cache=False).logits
    return logits


def dense_logits(output: Path) -> torch.Tensor:
    """Of a dense output, by the loading that ``calibrant evaluate`` does."""
    with torch.no_grad():
        model = load_whole(ModelFolder(output), "cpu", "float32")
        logits: torch.Tensor = model(input_ids=TOKENS[:2], use_cache=False).logits
    return logits


def weights_of(layer: LayerPlan) -> int:
    return math.prod(layer.shape)


def bits_on_disk(source: Path, output: Path, weights: int) -> float:
    """Bits of each of the compressed ``weights`` in the files: what the files lost is theirs."""
    before, after = (sum(file.stat().st_size for file in one.glob("*.safetensors")) for one in (source, output))
    return round(32 - 8 * (before - after) / weights, 2)


def with_inputs(outcome: Outcome, source: Path, output: Path) -> None:
    """Int8 weights and inputs; a sentence before any work is a result too."""
    try:
        prepared = cb.prepare(source, output=output, recipe=W8A8, dtype="float32", overwrite=True)
    except cb.CalibrantError as error:
        outcome.w8a8_refused = str(error).replace(str(source), "")
        return
    prepared.run()
    found = logits_of(output, outcome.architecture)
    if prepared.plan.target.layout:
        outcome.w8a8 = distance(found, decoded_logits(output))


def attempt(outcome: Outcome, folder: Path) -> None:
    """Fill ``outcome`` step by step; an exception belongs to the step that ``outcome.result`` names."""
    source, output = folder / "source", folder / "output"
    outcome.result = "not shrunk"
    model = tiny_model(outcome.architecture, outcome.model_type)
    with torch.no_grad():
        model(input_ids=TOKENS[:2], use_cache=False)
    model.save_pretrained(source)
    write_tokenizer(source)
    outcome.result = "source does not load"
    original = logits_of(source, outcome.architecture)
    outcome.result = "refused"
    prepared = cb.prepare(source, output=output, recipe=recipe(4, "gptq"), calibration=random_set(), dtype="float32")
    outcome.blocks = len(prepared.plan.blocks)
    outcome.share = round(prepared.plan.share, 4)
    outcome.stored = "packed" if prepared.plan.target.layout else "dense"
    prepared.run()
    outcome.size = bits_on_disk(source, output, sum(map(weights_of, prepared.plan.layers.values())))
    outcome.result = "walk fails"
    outcome.walk = walk_distance(source, outcome.architecture)
    outcome.bfloat16 = walk_distance(source, outcome.architecture, torch.bfloat16)
    outcome.result = "output does not load"
    found = logits_of(output, outcome.architecture)
    if outcome.stored == "packed":
        outcome.logits = distance(found, decoded_logits(output))
    outcome.result = "8 bits fail"
    cb.compress(source, output=output, recipe=recipe(8, "rtn"), dtype="float32", overwrite=True)
    outcome.eight_bits = median_distance(logits_of(output, outcome.architecture), original)
    outcome.result = "W8A8 fails"
    with_inputs(outcome, source, output)
    outcome.result = "Wanda fails"
    wanda = cb.builtin_recipes()["wanda-50"]
    report = cb.compress(source, output=output, recipe=wanda, calibration=random_set(), dtype="float32", overwrite=True)
    outcome.zeros = sum(one.zeros for one in report.layers) / sum(one.elements for one in report.layers)
    wrong = [
        name
        for name, value, bound in (
            ("walk", outcome.walk, EQUAL), ("bfloat16", outcome.bfloat16, CLOSE),
            ("logits", outcome.logits, EQUAL), ("8 bits", outcome.eight_bits, CLOSE),
            ("W8A8", outcome.w8a8, EQUAL), ("zeros", abs(outcome.zeros - 0.5), 0.01),
            ("Wanda's logits", distance(logits_of(output, outcome.architecture), dense_logits(output)), EQUAL),
        )
        if value is not None and not value <= bound
    ]  # fmt: skip
    outcome.result = f"differs: {', '.join(wrong)}" if wrong else "works"


def child(outcome: Outcome, answers: Any, verbose: bool) -> None:
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as folder:
        try:
            with quietly():
                attempt(outcome, Path(folder))
        except Exception as error:  # whatever a model does is a result
            outcome.detail = f"{type(error).__name__}: {error}".splitlines()[0].replace(folder, "").strip()
            if verbose:
                traceback.print_exc()
    answers.put(outcome)


def try_one(architecture: str, model_type: str, verbose: bool) -> Outcome:
    """In a forked process with a time limit."""
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    outcome = Outcome(architecture, model_type)
    process = context.Process(target=child, args=(outcome, answers, verbose))
    process.start()
    deadline = time.monotonic() + SECONDS
    while process.is_alive() and answers.empty() and time.monotonic() < deadline:
        time.sleep(0.02)
    if not answers.empty():
        outcome = answers.get()
    elif process.is_alive():
        outcome.result = f"no result within {SECONDS} s"
    process.kill()
    process.join()
    return outcome


def architectures(multimodal: bool) -> dict[str, str]:
    """A model type for every class, its own where the class is listed several times."""
    found: dict[str, str] = {}
    listed = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items())
    for model_type, names in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.items() if multimodal else ():
        listed += [(model_type, name) for name in ((names,) if isinstance(names, str) else names)]
    for model_type, architecture in listed:
        kind = getattr(transformers, architecture, None)
        own = kind is not None and kind.config_class.model_type == model_type
        if own or architecture not in found:
            found[architecture] = model_type
    return dict(sorted(found.items()))


def row_of(one: Outcome) -> list[str]:
    numbers = [
        "" if value is None else f"{value:.1g}" if value else "0"
        for value in (one.walk, one.bfloat16, one.logits, one.eight_bits, one.w8a8)
    ]
    if one.w8a8_refused:
        numbers[-1] = "refused"
    elif one.w8a8 is None and one.zeros is not None:
        numbers[-1] = "dense"
    share = "" if one.share is None else f"{one.share:.0%}"
    size = "" if one.size is None else f"{one.size:.1f}"
    zeros = "" if one.zeros is None else f"{one.zeros:.0%}"
    return [one.architecture, one.result, str(one.blocks or ""), share, one.stored, size, *numbers, zeros, one.detail]


HEADINGS = [
    "architecture", "result", "blocks", "share", "stored", "size", "walk", "bfloat16", "logits", "8 bits", "W8A8",
    "Wanda", "why",
]  # fmt: skip


def page(outcomes: list[Outcome], date: str) -> str:
    """The table as Markdown."""
    works = sum(one.result == "works" for one in outcomes)
    made = sum(one.result != "not shrunk" for one in outcomes)
    lines = [
        "# Architectures",
        "",
        f"Language models of transformers {transformers.__version__}, shrunk to tiny models with random weights, on "
        f"{date}: {works} of {made} that could be made work; of {len(outcomes) - made} no tiny model could be made. "
        "All causal ones are here, and those that also take images or sounds. Written by "
        "`benchmarks/architectures.py --multimodal`; do not edit.",
        "",
        "*Works* says: GPTQ at 4 bits on 8 x 32 random tokens ends without an error, transformers loads the output "
        "without a missing parameter and runs it, and every number that the row has is within its bound. All but one "
        f"column is done in float32 on a CPU, in at most {SECONDS} seconds. Nothing is said about real weights.",
        "",
        "| column | what is checked |",
        "| --- | --- |",
        "| share | not checked: of the weights of the blocks that a text runs through, those that are compressed |",
        "| stored | not checked: packed, or dense (as rounded values) where transformers loads no packed ones |",
        "| size | not checked: bits on disk of each compressed weight, scales included, in GPTQ's output; 32 before. "
        "Models this small have layers that only one scale a channel fits, of which scales take more than usual |",
        "| walk | hidden states behind the last block, walked block by block, against the model's own; the norm of the "
        f"difference over the norm, 2 x 32 tokens, at most {EQUAL:g} |",
        "| bfloat16 | the same walk in bfloat16, as runs on processors with fast bfloat16 compute it: the relative "
        f"distance of each token, of these the median, at most {CLOSE:g} |",
        "| logits | the loaded packed output against a plain model with the decoded weights, as above, at most "
        f"{EQUAL:g}; empty for dense outputs, whose values at 4 bits are compared with nothing here |",
        "| 8 bits | the logits of a second output, rounded to 8 bits, against the original's: the relative distance of "
        f"each token, of these the median, at most {CLOSE:g} |",
        "| W8A8 | the loaded output with int8 weights and int8 inputs against a plain model with the decoded weights "
        f"and rounded inputs, at most {EQUAL:g}; *dense*: stored as rounded values, loaded and run; *refused*: by a "
        "sentence before any work, mostly since experts are fused. compressed-tensors 0.20 takes one scale for all "
        "tokens where a linear's input is not `[rows, length, width]`, so three architectures differ there |",
        "| Wanda | share of zeros of the compressed weights, 50%; the loaded output is run |",
        "",
        "*Refused*: the compression ends with the error in the last column. *Not shrunk*: no tiny model could be made "
        "here, so nothing is known.",
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "|" + " --- |" * len(HEADINGS),
    ]
    for one in outcomes:
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row_of(one)) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--multimodal", action="store_true", help="those that also take images or sounds too")
    parser.add_argument("model_types", nargs="*", help="only these; the other rows stay as they are")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity(50)
    every = architectures(options.multimodal)
    chosen = {a: t for a, t in every.items() if not options.model_types or t in options.model_types}
    torch.set_num_threads(1)
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # threads of a forked process find no pool of PyTorch's
    numba.config.THREADING_LAYER = "workqueue"  # OpenMP's does not survive a fork
    # What is imported and compiled here is there in every forked process.
    with tempfile.TemporaryDirectory() as folder, quietly():
        attempt(Outcome("LlamaForCausalLM", "llama"), Path(folder))
    table = Table(*HEADINGS)
    file = HERE / "results" / "architectures.json"
    known = json.loads(file.read_text())["architectures"] if options.model_types and file.exists() else []
    outcomes = {one["architecture"]: Outcome(**one) for one in known}
    for architecture, model_type in chosen.items():
        outcome = outcomes[architecture] = try_one(architecture, model_type, verbose=bool(options.model_types))
        table.add_row(*row_of(outcome))
        print(" | ".join(row_of(outcome)), flush=True)
    Console(width=200).print(table)
    date = datetime.now(UTC).date().isoformat()
    (HERE.parent / "docs" / "architectures.md").write_text(page(list(outcomes.values()), date), encoding="utf-8")
    result = {
        "date": date,
        "system": platform.platform(),
        "versions": pinned_versions(),
        "architectures": [asdict(one) for one in outcomes.values()],
    }
    file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
