"""Two processes that torchrun starts beside one: time of every rank, and what differs in the result.

    python benchmarks/ranks.py MODEL [--samples 32] [--length 512] [--recipe gptq-w4a16]

Each rank computes with one thread, as one process with one thread does beside them; the third run has one process with
two threads. The result is written to ``results/ranks.json``.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import calibrant as cb

RESULT = Path(__file__).parent / "results" / "ranks.json"


def run(options: argparse.Namespace, output: Path, calibration: Path, ranks: int, threads: int) -> dict[str, Any]:
    """Compress in so many processes of so many threads."""
    start = [sys.executable, "-m"]
    if ranks > 1:
        start += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    command = ["calibrant", "compress", options.model, "-o", str(output), "-c", str(calibration), "-r", options.recipe]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "NUMBA_NUM_THREADS": str(threads)}
    begin = time.perf_counter()
    subprocess.run([*start, *command, "--quiet"], env=environment, check=True)
    wall = time.perf_counter() - begin
    report = cb.RunReport.read(output)
    seconds = report.rank_seconds or [report.seconds]
    return {"ranks": ranks, "threads": threads, "wall_seconds": round(wall, 1), "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--recipe", default="gptq-w4a16")
    options = parser.parse_args()
    table = Table("processes", "threads", "seconds on the clock", "of each rank", "forward", "solve", "exchange")
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        text = cb.select("builtin", tokenizer=options.model, samples=options.samples, length=options.length)
        text.save(work / "set")
        for ranks, threads in ((1, 1), (2, 1), (1, 2)):
            found = run(options, work / f"{ranks}-{threads}", work / "set", ranks, threads)
            runs.append(found)
            stages = found["seconds"]
            table.add_row(
                str(ranks), str(threads), str(found["wall_seconds"]),
                ", ".join(f"{sum(one.values()):.1f}" for one in stages),
                *(", ".join(f"{one.get(name, 0):.1f}" for one in stages) for name in ("forward", "solve", "exchange")),
            )  # fmt: skip
        reports = [cb.RunReport.read(work / name) for name in ("1-1", "2-1")]
        pairs = zip(*(report.layers for report in reports), strict=True)
        differences = [abs(one.relative_error / other.relative_error - 1) for one, other in pairs]
    Console().print(table)
    print(f"errors of layers differ by at most {max(differences):.2%}")
    settings = {"model": Path(options.model).name, "recipe": options.recipe}
    settings |= {"samples": options.samples, "length": options.length}
    machine = {"cores": os.cpu_count(), "capabilities": torch.backends.cpu.get_cpu_capability()}
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {"system": platform.platform(), **machine},
        "versions": {"calibrant": cb.__version__, "torch": torch.__version__},
        "settings": settings,
        "largest_difference_of_errors": max(differences),
        "runs": runs,
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
