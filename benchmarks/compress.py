"""Compression, Calibrant beside its peers: wall time, CPU time, peak memory and quality, in turn, in one session.

    python benchmarks/compress.py MODEL --corpus c4.utf8.gz --text wiki.test.raw.gz --rounds 3

All get the same tokens, scheme and compute dtype. A peer runs in its own virtual environment, the versions pinned
beside its script, made on the first call. The JSON holds every run, the machine, the versions and the date; it is
written after every run, and a stopped benchmark goes on where it was.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table

import calibrant as cb
from calibrant.calibration.calibration_set import CalibrationSet
from calibrant.pipeline.estimate import measured_rate
from calibrant.recipes.recipe import load_recipe

HERE = Path(__file__).parent
WORK = HERE / ".work"
# The module of each peer, and its environment's versions stand in peers/.
PEERS = {"llm-compressor": "llmcompressor", "gptqmodel": "gptqmodel", "auto-round": "auto_round"}

FLOATS = ("rtn-fp8", "gptq-fp8", "gptq-nvfp4a16", "gptq-mxfp4a16")


@dataclass(frozen=True)
class Comparison:
    """A method that tools share: our recipe, and what each peer's script calls it.

    ``one_pass``: it takes one forward pass over the tokens, so that the floor can be said.
    """

    recipe: dict[str, Any]
    peers: dict[str, str]
    one_pass: bool = True


def comparisons(bits: int, group_size: int) -> dict[str, Comparison]:
    """By method."""
    grouped = {"weights": {"bits": bits, "group_size": group_size}}
    clipped = {"weights": {**grouped["weights"], "range_search": "clip"}}
    int8 = {"weights": {"bits": 8}, "activations": {"dynamic": True}}
    rtn, gptq = {"name": "rtn"}, {"name": "gptq"}
    smooth, awq = [{"name": "smoothquant", "alpha": 0.8}], [{"name": "awq"}]
    best = load_recipe("best-w3a16" if bits == 3 else "best-w4a16").model_dump()
    best["scheme"]["weights"] |= clipped["weights"]
    return {
        "gptq": Comparison({"method": gptq, "scheme": grouped}, {"llm-compressor": "gptq", "gptqmodel": "gptq"}),
        "awq": Comparison({"transforms": awq, "method": rtn, "scheme": clipped}, {"llm-compressor": "awq"}, False),
        "smoothquant": Comparison(
            {"transforms": smooth, "method": rtn, "scheme": int8}, {"llm-compressor": "smoothquant"}, False
        ),
        "sparsegpt": Comparison(
            {"method": {"name": "sparsegpt"}, "scheme": {"sparsity": "2:4"}}, {"llm-compressor": "sparsegpt"}
        ),
        "wanda": Comparison({"method": {"name": "wanda"}, "scheme": {"sparsity": "2:4"}}, {"llm-compressor": "wanda"}),
        "best": Comparison(best, {"auto-round": "light"}, False),
        "best-beside-default": Comparison(best, {"auto-round": "default"}, False),
        # The formats of floating-point numbers, each by its recipe.
        **{name: Comparison(load_recipe(name).model_dump(), {"llm-compressor": name}) for name in FLOATS},
        # Beside every peer's method for the same target, above.
        "best-2:4": Comparison(load_recipe("best-2:4").model_dump(), {}, False),
        "best-w8a8": Comparison(load_recipe("best-w8a8").model_dump(), {}, False),
    }


@dataclass
class Run:
    """One process: seconds and bytes as the operating system counted them; None where a count was lost."""

    tool: str
    method: str
    round: int
    wall_seconds: float
    cpu_seconds: float | None
    peak_memory_bytes: int | None
    stages: dict[str, float] | None = None


def warm(python: str, module: str, model: Path) -> None:
    """Bring a tool's libraries and the model's file into the page cache, so that neither tool pays for a cold disk."""
    subprocess.run([python, "-c", f"import {module}"], check=True, capture_output=True)
    for file in model.glob("*.safetensors"):
        with file.open("rb") as stream:
            while stream.read(1 << 24):
                pass


def timed(command: list[str], log: Path) -> tuple[float, float, int]:
    """Run to the end; wall seconds, CPU seconds, peak resident bytes."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    begin = time.perf_counter()
    with log.open("w") as output:
        # In the working folder, since some tools leave logs where they are run.
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=WORK)
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    if os.waitstatus_to_exitcode(status):
        sys.exit(f"{' '.join(command)} failed; see {log}")
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def peer_python(peer: str) -> Path:
    """The peer's interpreter; its environment is made on the first call."""
    folder = WORK / "peers" / peer
    python = folder / "bin" / "python"
    if not (folder / ".ready").exists():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        requirements = HERE / "peers" / peer / "requirements.txt"
        subprocess.run([python, "-m", "pip", "install", "--quiet", "torch==2.13.0"], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", requirements], check=True)
        (folder / ".ready").touch()
    return python


def run_ours(options: argparse.Namespace, tokens: Path, method: str, one: Comparison, number: int) -> Run:
    """Calibrant's command line."""
    output, recipe = WORK / f"calibrant-{method}", WORK / f"{method}.yaml"
    recipe.write_text(yaml.safe_dump({"name": method, "description": method, **one.recipe}), encoding="utf-8")
    entry = "from calibrant.cli.main import main; main()"
    arguments = ["-r", recipe, "-c", tokens, "-o", output, "--dtype", options.dtype, "--overwrite"]
    command = [sys.executable, "-c", entry, "compress", str(options.model), *map(str, arguments)]
    warm(sys.executable, "calibrant.api", options.model)
    measured = timed(command, WORK / "calibrant.log")
    return Run("calibrant", method, number, *measured, json.loads((output / "report.json").read_text())["seconds"])


def run_peer(options: argparse.Namespace, tokens: Path, method: str, peer: str, name: str, number: int) -> Run:
    """The peer's script."""
    output, python = WORK / f"{peer}-{method}", peer_python(peer)
    shutil.rmtree(output, ignore_errors=True)
    arguments = [options.model, tokens / "tokens.safetensors", output, options.dtype, name]
    command = [python, HERE / "peers" / peer / "compress.py", *arguments, options.bits, options.group_size]
    warm(str(python), PEERS[peer], options.model)
    return Run(peer, method, number, *timed(list(map(str, command)), WORK / f"{peer}.log"))


def floor_flops(model: Path, made: CalibrationSet) -> dict[str, float]:
    """Operations that no implementation can avoid: one forward pass of the blocks, Hessians as symmetric products.

    Attention is counted causal; embedding, norms and the head are not counted.
    """
    config = json.loads((model / "config.json").read_text())
    tokens, length = made.tokens.numel(), made.tokens.shape[1]
    width, inner, blocks = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    heads, shared = config["num_attention_heads"], config["num_key_value_heads"]
    attention_width = heads * config["head_dim"]
    kv_width = shared * config["head_dim"]
    linear = width * (attention_width + 2 * kv_width) + attention_width * width + 3 * width * inner
    attention = 2.0 * attention_width * (length + 1)
    hessian = 2 * width**2 + attention_width**2 + inner**2
    return {
        "forward": blocks * tokens * (2.0 * linear + attention),
        "statistics": blocks * tokens * float(hessian),
    }


def floor_ratios(runs: list[Run], flops: dict[str, float], rates: list[float]) -> dict[str, dict[str, float]]:
    """Our stages over the floor at the best rate seen, from medians: seconds measured, floor seconds, ratio."""
    rate = max(rates)
    table: dict[str, dict[str, float]] = {}
    for method in dict.fromkeys(run.method for run in runs):
        ours = [run.stages for run in runs if run.tool == "calibrant" and run.method == method and run.stages]
        spent = {stage: statistics.median(stages[stage] for stages in ours) for stage in ours[0]}
        if "statistics" not in spent:  # round-to-nearest runs no forward pass
            continue
        floor = {"forward": flops["forward"] / rate}
        if method != "wanda":
            floor["statistics"] = flops["statistics"] / rate
        row = {f"{stage} seconds": round(seconds, 2) for stage, seconds in spent.items()}
        row |= {f"{stage} floor": round(seconds, 2) for stage, seconds in floor.items()}
        row |= {f"{stage} ratio": round(spent[stage] / seconds, 2) for stage, seconds in floor.items()}
        row["whole ratio"] = round(sum(spent.values()) / sum(floor.values()), 2)
        table[method] = row
    return table


def quality(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Perplexity and divergence from the original, from a process of its own.

    A child's count of memory begins with its parent's, which therefore must stay small.
    """
    arguments = [folder, options.model, options.text, options.windows]
    command = [sys.executable, __file__, "--evaluate", *map(str, arguments)]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def show(runs: list[Run], found: dict[str, dict[str, Any]], ratios: dict[str, dict[str, float]]) -> None:
    """The table with ratios, on the terminal."""
    table = Table("method", "tool", "wall s", "CPU s", "peak MB", "perplexity", "mean KL", "wall ratio")
    walls: dict[str, float] = {}
    for tool, method in dict.fromkeys((run.tool, run.method) for run in runs):
        chosen = [run for run in runs if (run.tool, run.method) == (tool, method)]
        wall = statistics.median(run.wall_seconds for run in chosen)
        walls.setdefault(method, wall)  # ours is the first of each method
        measured = found[f"{tool} {method}"]
        kl = measured["divergence"]
        table.add_row(
            method,
            tool,
            f"{wall:.1f}",
            _median([run.cpu_seconds for run in chosen], 1.0),
            _median([run.peak_memory_bytes for run in chosen], 1e6),
            f"{measured['perplexity']['value']:.2f}",
            f"{kl['kl_mean']:.4f} ± {kl['kl_standard_error']:.4f}",
            "" if tool == "calibrant" else f"{wall / walls[method]:.2f}",
        )
    console = Console(width=140)
    console.print(table)
    for method, row in ratios.items():
        console.print(f"{method}: " + ", ".join(f"{name} {value}" for name, value in row.items()))


def _median(counts: Sequence[float | None], unit: float) -> str:
    known = [count for count in counts if count is not None]
    return f"{statistics.median(known) / unit:.0f}" if known else ""


def pinned_versions() -> dict[str, str]:
    """Ours, and what each peer's requirements pin it to."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "numba")}
    for peer in PEERS:
        first = (HERE / "peers" / peer / "requirements.txt").read_text().splitlines()[0]
        versions[peer] = first.partition("==")[2]
    return {"calibrant": cb.__version__, **versions}


def main() -> None:
    if sys.argv[1:2] == ["--evaluate"]:
        folder, model, text, windows = sys.argv[2:]
        print(json.dumps(asdict(cb.evaluate(folder, against=model, text=text, limit=int(windows)))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="model folder")
    parser.add_argument("--corpus", default="builtin", help="text to calibrate with")
    parser.add_argument("--text", default="builtin", help="held-out text to evaluate on")
    parser.add_argument("--methods", nargs="+", default=["gptq", "sparsegpt", "wanda"])
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--windows", type=int, default=40, help="evaluation windows of 512 tokens")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "compress.json", help="kept and gone on with")
    options = parser.parse_args()
    options.model = options.model.absolute()
    known = comparisons(options.bits, options.group_size)
    if not set(options.methods) <= set(known):
        parser.error(f"--methods: there are {', '.join(known)}")
    WORK.mkdir(exist_ok=True)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    chosen = {method: known[method] for method in options.methods}
    for method, one in chosen.items():
        peers = {peer: name for peer, name in one.peers.items() if peer in options.peers}
        chosen[method] = replace(one, peers=peers)
    for peer in {peer for one in chosen.values() for peer in one.peers}:
        peer_python(peer)
    made = cb.select(options.corpus, tokenizer=options.model, samples=options.samples, length=options.length)
    tokens = WORK / "tokens"
    shutil.rmtree(tokens, ignore_errors=True)
    made.save(tokens)
    settings = {
        "model": options.model.resolve().name,
        "bits": options.bits,
        "group_size": options.group_size,
        "samples": options.samples,
        "length": options.length,
        "windows": options.windows,
        "dtype": options.dtype,
        "corpus": Path(options.corpus).name,
        "text": Path(options.text).name,
        "set_sha256": made.sha256,
        "machine": {"processor": processor(), "cores": os.cpu_count(), "system": platform.platform()},
        "versions": pinned_versions(),
    }
    result: dict[str, Any] = json.loads(options.json.read_text()) if options.json.exists() else {}
    if result.get("settings") != settings:
        result = {"settings": settings, "matrix_product_flops_per_second": [], "runs": [], "quality": {}}
    result["date"] = datetime.now(UTC).date().isoformat()
    rates = result["matrix_product_flops_per_second"]

    def keep() -> None:
        options.json.write_text(json.dumps(result, indent=2) + "\n")

    def do(tool: str, method: str, number: int, run: Callable[[], Run]) -> None:
        if any((one["tool"], one["method"], one["round"]) == (tool, method, number) for one in result["runs"]):
            return
        rates.append(measured_rate(getattr(torch, options.dtype), torch.device("cpu")))
        done = run()
        print(f"{tool} {method}: {done.wall_seconds:.1f} s", flush=True)
        result["runs"].append(asdict(done))
        result["quality"][f"{tool} {method}"] = quality(options, WORK / f"{tool}-{method}")
        keep()

    for number in range(options.rounds):
        for method, one in chosen.items():
            do("calibrant", method, number, partial(run_ours, options, tokens, method, one, number))
            for peer, name in one.peers.items():
                do(peer, method, number, partial(run_peer, options, tokens, method, peer, name, number))
    runs = [Run(**one) for one in result["runs"] if one["method"] in chosen]
    runs.sort(key=lambda run: (list(chosen).index(run.method), run.tool != "calibrant"))
    one_pass = [run for run in runs if chosen[run.method].one_pass]
    result["floor"] = floor_ratios(one_pass, floor_flops(options.model, made), rates)
    keep()
    show(runs, result["quality"], result["floor"])


def processor() -> str:
    """The processor as Linux names it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
