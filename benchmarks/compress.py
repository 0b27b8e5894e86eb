"""Compression, Calibrant beside a peer: wall time, CPU time, peak memory and quality, in turn, in one session.

    python benchmarks/compress.py MODEL --corpus c4.utf8.gz --text wiki.test.raw.gz --rounds 3

Both get the same tokens, scheme and compute dtype. The peer runs in its own virtual environment, the versions pinned
beside its script, made on the first call. The JSON holds every run, the machine, the versions and the date.
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
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import calibrant as cb
from calibrant.calibration.calibration_set import CalibrationSet
from calibrant.compression.plan import measured_rate

HERE = Path(__file__).parent
WORK = HERE / "work"
PEER = "llm-compressor"
METHODS = ["gptq-w4a16-g64", "sparsegpt-2:4", "wanda-2:4"]


@dataclass
class Run:
    """One process: seconds and bytes as the operating system counted them."""

    tool: str
    method: str
    round: int
    wall_seconds: float
    cpu_seconds: float
    peak_memory_bytes: int
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
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    if os.waitstatus_to_exitcode(status):
        sys.exit(f"{' '.join(command)} failed; see {log}")
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def peer_python() -> Path:
    """The peer's interpreter; its environment is made on the first call."""
    folder = WORK / "peers" / PEER
    python = folder / "bin" / "python"
    if not (folder / ".ready").exists():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        requirements = HERE / "peers" / PEER / "requirements.txt"
        subprocess.run([python, "-m", "pip", "install", "--quiet", "torch==2.13.0"], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", requirements], check=True)
        (folder / ".ready").touch()
    return python


def run_ours(model: Path, tokens: Path, method: str, dtype: str, number: int) -> Run:
    """Calibrant's command line."""
    output = WORK / f"calibrant-{method.replace(':', '-')}"
    entry = "from calibrant.cli.main import main; main()"
    options = ["-r", method, "-c", str(tokens), "-o", str(output), "--dtype", dtype, "--overwrite"]
    command = [sys.executable, "-c", entry, "compress", str(model), *options]
    warm(sys.executable, "calibrant.api", model)
    measured = timed(command, WORK / "calibrant.log")
    return Run("calibrant", method, number, *measured, json.loads((output / "report.json").read_text())["seconds"])


def run_peer(model: Path, tokens: Path, method: str, dtype: str, number: int) -> Run:
    """The peer's script."""
    output = WORK / f"{PEER}-{method.replace(':', '-')}"
    shutil.rmtree(output, ignore_errors=True)
    script = HERE / "peers" / PEER / "compress.py"
    command = [
        str(peer_python()),
        str(script),
        str(model),
        str(tokens / "tokens.safetensors"),
        str(output),
        dtype,
        method,
    ]
    warm(str(peer_python()), "llmcompressor", model)
    return Run(PEER, method, number, *timed(command, WORK / f"{PEER}.log"))


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
        floor = {"forward": flops["forward"] / rate}
        if not method.startswith("wanda"):
            floor["statistics"] = flops["statistics"] / rate
        spent = {stage: statistics.median(stages[stage] for stages in ours) for stage in ours[0]}
        row = {f"{stage} seconds": round(seconds, 2) for stage, seconds in spent.items()}
        row |= {f"{stage} floor": round(seconds, 2) for stage, seconds in floor.items()}
        row |= {f"{stage} ratio": round(spent[stage] / seconds, 2) for stage, seconds in floor.items()}
        row["whole ratio"] = round(sum(spent.values()) / sum(floor.values()), 2)
        table[method] = row
    return table


def quality(model: Path, methods: list[str], text: str, windows: int) -> dict[str, dict[str, object]]:
    """Perplexity and divergence from the original of the last output of each tool."""
    found = {}
    for method in methods:
        for tool in ("calibrant", PEER):
            folder = WORK / f"{tool}-{method.replace(':', '-')}"
            measured = cb.evaluate(folder, against=model, text=text, limit=windows)
            found[f"{tool} {method}"] = asdict(measured)
    return found


def show(runs: list[Run], found: dict[str, dict], ratios: dict[str, dict[str, float]]) -> None:
    """The table with ratios, on the terminal."""
    table = Table("method", "tool", "wall s", "CPU s", "peak MB", "perplexity", "mean KL", "wall ratio")
    for method in dict.fromkeys(run.method for run in runs):
        walls = {}
        for tool in ("calibrant", PEER):
            chosen = [run for run in runs if run.tool == tool and run.method == method]
            walls[tool] = statistics.median(run.wall_seconds for run in chosen)
            measured = found[f"{tool} {method}"]
            kl = measured["divergence"]
            table.add_row(
                method,
                tool,
                f"{walls[tool]:.1f}",
                f"{statistics.median(run.cpu_seconds for run in chosen):.1f}",
                f"{statistics.median(run.peak_memory_bytes for run in chosen) / 1e6:.0f}",
                f"{measured['perplexity']['value']:.2f}",
                f"{kl['kl_mean']:.4f} ± {kl['kl_standard_error']:.4f}",
                "" if tool == "calibrant" else f"{walls[PEER] / walls['calibrant']:.2f}",
            )
    console = Console(width=140)
    console.print(table)
    for method, row in ratios.items():
        console.print(f"{method}: " + ", ".join(f"{name} {value}" for name, value in row.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="model folder")
    parser.add_argument("--corpus", default="builtin", help="text to calibrate with")
    parser.add_argument("--text", default="builtin", help="held-out text to evaluate on")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--windows", type=int, default=40, help="evaluation windows of 512 tokens")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "compress.json")
    options = parser.parse_args()
    WORK.mkdir(exist_ok=True)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    peer_python()
    made = cb.select(options.corpus, tokenizer=options.model, samples=options.samples, length=options.length)
    tokens = WORK / "tokens"
    made.save(tokens)
    runs: list[Run] = []
    rates: list[float] = []
    for number in range(options.rounds):
        for method in options.methods:
            rates.append(measured_rate(getattr(torch, options.dtype), torch.device("cpu")))
            runs.append(run_ours(options.model, tokens, method, options.dtype, number))
            runs.append(run_peer(options.model, tokens, method, options.dtype, number))
            print(*(f"{run.tool} {run.method}: {run.wall_seconds:.1f} s" for run in runs[-2:]), sep="; ", flush=True)
    found = quality(options.model, options.methods, options.text, options.windows)
    ratios = floor_ratios(runs, floor_flops(options.model, made), rates)
    show(runs, found, ratios)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "numba")}
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {"processor": processor(), "cores": os.cpu_count(), "system": platform.platform()},
        "versions": {"calibrant": cb.__version__, **versions, PEER: "0.14.0.1"},
        "settings": {
            "model": options.model.resolve().name,
            "samples": options.samples,
            "length": options.length,
            "dtype": options.dtype,
            "corpus": Path(options.corpus).name,
            "text": Path(options.text).name,
            "set_sha256": made.sha256,
        },
        "matrix_product_flops_per_second": rates,
        "floor": ratios,
        "runs": [asdict(run) for run in runs],
        "quality": found,
    }
    options.json.write_text(json.dumps(result, indent=2) + "\n")


def processor() -> str:
    """The processor as Linux names it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
