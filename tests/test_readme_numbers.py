"""Every number of the README is a measurement in a committed file, or the name of something."""

import csv
import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest

from calibrant.calibration.generate import SOURCES
from calibrant.calibration.selection.request import Strategy

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PEER = {
    "gptq": "GPTQ, 4 bits",
    "sparsegpt": "SparseGPT, 2:4",
    "smoothquant": "SmoothQuant, W8A8",
    "wanda": "Wanda, 2:4",
}
TRAINED = "gptq, signed clip, scales refitted, damped, drift corrected by half, reconstructed"
BEST = {
    "4 bit": ("4 bits", "best-w4a16", "gptq", "rtn", TRAINED),
    "3 bit": ("3 bits", "best-w3a16", "gptq", "rtn", TRAINED),
    "2:4": (
        "2:4 zeros",
        "best-2:4",
        "sparsegpt",
        "magnitude",
        "sparsegpt, refined, drift corrected by half, reconstructed",
    ),
}
MODELS = {"gemma-3-270m": "Gemma-3-270M", "smollm2-135m-instruct": "SmolLM2-135M-Instruct"}
NUMBER_WORDS = "two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|half|third|quarter|dozen|hundred|twice"
WORDS = dict(enumerate("none one two three four five six seven eight nine ten eleven twelve".split()))  # noqa: SIM905
# Numbers that name a thing: versions, targets, sizes of models, sections and the like.
NAMES = [
    r"SmolLM2-135M(-Instruct)?", r"Gemma-3-270M", r"WikiText-2", r"\bC4\b", r"W8A8", r"2:4", r"n:m", r"Q\d_[K\d]",
    r"FP8", r"MXFP4", r"NVFP4", r"int8", r"[2-8] to 8-bit", r"[2-4] bits", r"95 % intervals", r"llm-compressor 0\.14",
    r"AVX512-BF16", r"Apache-2\.0", r"2SSP", r"Python 3\.11", r"bfloat16", r"ten minutes", r"below 300\nmillion",
    r"0\.2\.0 is published", r"Q4_1", r"in 4 to 8", r"SmolLM2's",
]  # fmt: skip


def result(name: str) -> Any:
    return json.loads((ROOT / f"benchmarks/results/{name}.json").read_text(encoding="utf-8"))


def seconds(runs: list[dict[str, Any]], tool: str, method: str) -> float:
    (found,) = (run["wall_seconds"] for run in runs if (run["tool"], run["method"], run["round"]) == (tool, method, 0))
    return float(found)


def kl(quality: dict[str, Any], digits: int) -> str:
    found = quality["divergence"]
    return f"{found['kl_mean']:.{digits}f} ± {found['kl_standard_error']:.{digits}f}"


def study() -> list[str]:
    with (ROOT / "studies/impact/tables/components.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if (row["measure"], row["on"]) == ("KL", "wikitext")]
    shares = [float(row["source share %"]) for row in rows]
    low = min(float(row["source share % low"]) for row in rows)
    high = max(float(row["source share % high"]) for row in rows)
    plan = (ROOT / "studies/impact.yaml").read_text(encoding="utf-8")
    draws, rows_of_a_set, length = (
        re.search(rf"^{key}: (\d+)", plan, re.M)[1] for key in ("draws", "samples", "length")
    )  # type: ignore[index]
    part = plan.partition("sources:")[2].partition("texts:")[0]
    sources = len(re.findall(r"^  \w+: \{corpus", part, re.M))
    pages = len(list((ROOT / "studies").glob("*/report.html")))
    return [
        f"{MODELS[rows[0]['model']]}, "
        f"compressed by {WORDS[len(rows)]} methods on {WORDS[sources]} sources of text, {WORDS[int(draws)]} draws",
        f"of {rows_of_a_set} × {length} tokens each",
        f"KL divergence of {WORDS[len(rows)]} methods by source",
        f"has this and {WORDS[pages - 1]} more studies",
        f"explains {min(shares):.0f} to {max(shares):.0f} % of the variance",
        f"(95 % intervals from {low:.0f} to\n{high:.0f} %)",
    ]


def data() -> list[str]:
    choice = result("selection")["selection of 100000"]
    fast, slow = result("generation"), result("generation_avx2")
    return [
        f"{WORDS[len(SOURCES)].capitalize()} generators and {WORDS[len(get_args(Strategy))]} selections",
        f"among {choice['documents']:,} documents with ZipCal is {choice['whole_ratio']:.0f} times as fast",
        f"a model writes its set {fast['ratio']:.1f} times as fast as with `generate` of `transformers`\n"
        f"({slow['ratio']:.1f} times in {slow['dtype']} with {slow['units']})",
    ]


def methods() -> list[str]:
    known = result("methods_gemma-3-270m")
    runs, settings = known["runs"], known["settings"]
    assert (settings["corpus"], settings["text"]) == ("c4.utf8.gz", "wiki.test.raw.gz")
    found = [
        f"KL divergence of {MODELS[settings['model']]} from the original on WikiText-2, {settings['samples']} × "
        f"{settings['length']} tokens of C4,\none draw",
        "| target | recipe | KL | GPTQ or SparseGPT | rounding or magnitude |",
    ]
    for target, (shown, name, plain, plainest, label) in BEST.items():
        cells = [runs[f"{target}: {one}"] for one in (label, plain, plainest)]
        ours, other, rounding = (f"{one['kl_mean']:.3f} ± {one['kl_standard_error']:.3f}" for one in cells)
        found.append(f"| {shown} | `{name}` | **{ours}** | {other} | {rounding} |")
    return found


def speed() -> list[str]:
    known = result("compress_smollm2-135m-instruct")
    runs, settings = known["runs"], known["settings"]
    machine, peer = settings["machine"], settings["versions"]["llm-compressor"]
    rounds = {run["round"] for run in runs if run["tool"] in ("calibrant", "llm-compressor") and run["method"] in PEER}
    assert settings["corpus"] == "c4.utf8.gz"
    found = [
        f"{settings['model']}, {settings['samples']} × {settings['length']} tokens of C4, {settings['dtype']}, "
        f"{WORDS[machine['cores']]} cores of an {machine['processor']} with AVX512-BF16, "
        f"{WORDS[len(rounds)]} run\neach",
        f"| method | Calibrant | llm-compressor {peer[:4]} | ratio | KL, Calibrant | KL, llm-compressor |",
    ]
    for method, shown in PEER.items():
        ours, theirs = (seconds(runs, tool, method) for tool in ("calibrant", "llm-compressor"))
        digits = 4 if method == "smoothquant" else 3
        qualities = (kl(known["quality"][f"{tool} {method}"], digits) for tool in ("calibrant", "llm-compressor"))
        found.append(f"| {shown} | {ours:.0f} s | {theirs:.0f} s | {theirs / ours:.1f} | {' | '.join(qualities)} |")
    runs = result("compress_gemma-3-270m_second")["runs"]
    ratios = [
        seconds(runs, "llm-compressor", method) / seconds(runs, "calibrant", method)
        for method in ("gptq", "wanda", "smoothquant")
    ]
    slow = result("compress_smollm2-135m-instruct_avx2")
    runs, settings = slow["runs"], slow["settings"]
    gptq, wanda = (
        seconds(runs, "llm-compressor", method) / seconds(runs, "calibrant", method) for method in ("gptq", "wanda")
    )
    cores, tokens = WORDS[settings["machine"]["cores"]], f"{settings['samples']} × {settings['length']} tokens"
    return [
        *found,
        f"the ratios are {min(ratios):.1f} to {max(ratios):.1f}.\n"
        f"In {settings['dtype']} on {cores} cores with AVX2, SmolLM2 on {tokens}, they are "
        f"{gptq:.1f} for GPTQ and {wanda:.1f} for Wanda",
    ]


def memory() -> list[str]:
    largest = max(result("larger_than_memory")["runs"], key=lambda run: run["model_bytes"])
    # The peak of the process: what the text calls memory leaves the page cache out.
    model, peak = largest["model_bytes"] / 1e9, largest["resident_peak_bytes"] / 1e9
    dense = next(run for run in result("estimates_avx512")["runs"] if run["recipe"] == "wanda-2:4")
    return [
        f"a Llama of {model:.1f} GB with random weights was compressed\nin {peak:.1f} GB",
        f"unpacked it takes {dense['measured']['output_bytes'] / 1e9:.1f} GB",
    ]


def files() -> list[str]:
    return [f"{WORDS[len(list((ROOT / 'examples').glob('*.ipynb')))].capitalize()} notebooks"]


CLAIMS = [*study(), *data(), *methods(), *speed(), *memory(), *files()]


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_claim_is_what_was_measured(claim: str) -> None:
    assert claim in README


def test_the_changelog_says_what_a_busy_neighbour_costs() -> None:
    wall = result("busy_neighbour")["median_wall_seconds"]
    ours, without = (wall[f"{threads}, busy"] / wall[f"{threads}, quiet"] for threads in ("passive", "spinning"))
    changes = " ".join((ROOT / "CHANGELOG.md").read_text(encoding="utf-8").split())
    assert (
        f"takes {ours:.1f} times as long as on a quiet machine instead of {'twice' * (round(without, 1) == 2)}"
        in changes
    )


def test_every_number_is_traced() -> None:
    left = README
    for claim in CLAIMS:
        left = left.replace(claim, "")
    left = re.sub(r"```.*?```", "", left, flags=re.S)
    # Of code, the comments say something.
    left = re.sub(r"^    [^#\n]*|`[^`\n]*`|\]\([^)\n]*\)", "", left, flags=re.M)
    left = re.sub("|".join(NAMES), "", left)
    assert re.findall(rf"[^\n]*(?:\d|\b(?:{NUMBER_WORDS})\b)[^\n]*", left, re.I) == []
