"""What ``--dry-run`` says beside what the run then takes: time, memory, disk.

    python benchmarks/estimates.py MODEL...          # results/estimates_avx512.json on such a processor

Every run is a process of its own. The estimate is of seconds on the clock of an idle machine, so let nothing else run.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numba
import torch
import transformers
from rich.console import Console
from rich.table import Table

import calibrant as cb
from calibrant.modeling.checkpoint import ModelFolder
from calibrant.pipeline.memory import peak_memory

RECIPES = ["rtn-w8a16", "gptq-w4a16", "wanda-2:4", "smoothquant-w8a8"]
RESULTS = Path(__file__).parent / "results"


def measure(model: str, recipe: str, samples: int, length: int, dtype: str) -> dict[str, Any]:
    """Estimate one compression, run it, and put both side by side."""
    numbers = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, ModelFolder(model).vocabulary, (samples, length), generator=numbers)
    with tempfile.TemporaryDirectory() as folder:
        prepared = cb.prepare(
            model,
            output=Path(folder) / "out",
            recipe=recipe,
            calibration=cb.CalibrationSet.from_tokens(tokens),
            dtype=dtype,
        )
        begin = time.process_time()
        said = prepared.estimate()
        estimating, begin, wall = time.process_time() - begin, time.process_time(), time.perf_counter()
        most, done = [0], threading.Event()
        watcher = threading.Thread(target=_watch, args=(Path(folder), most, done))
        watcher.start()
        report = prepared.run()
        cpu, wall = time.process_time() - begin, time.perf_counter() - wall
        done.set()
        watcher.join()
    return {
        "model": Path(model).name,
        "recipe": recipe,
        "samples": samples,
        "length": length,
        "dtype": str(prepared.settings.dtype).removeprefix("torch."),
        "estimated": {
            "seconds": [round(value, 1) for value in said.seconds_range],
            "memory_bytes": said.memory_bytes,
            "output_bytes": said.output_bytes,
            "disk_bytes": said.disk_bytes,
        },
        "measured": {
            "cpu_seconds": round(cpu, 1),
            "wall_seconds": round(wall, 1),
            "memory_bytes": peak_memory(),
            "output_bytes": report.bytes_after,
            "disk_bytes": most[0],
        },
        "stages": report.seconds,
        "cpu_seconds_to_estimate": round(estimating, 1),
    }


def _watch(folder: Path, most: list[int], done: threading.Event) -> None:
    while not done.wait(0.05):
        total = 0
        for root, _, names in os.walk(folder):
            for name in names:
                try:
                    total += (Path(root) / name).stat().st_size
                except FileNotFoundError:
                    continue
        most[0] = max(most[0], total)


def main() -> None:
    """Run every recipe on every model and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--recipe", action="append", help=f"repeatable; by default {', '.join(RECIPES)}")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    recipes = given.recipe or RECIPES
    if given.one:
        print(json.dumps(measure(given.models[0], recipes[0], given.samples, given.length, given.dtype)))
        return
    runs = []
    for model in given.models:
        for recipe in recipes:
            command = [sys.executable, __file__, model, "--one", "--recipe", recipe, "--dtype", given.dtype]
            command += ["--samples", str(given.samples), "--length", str(given.length)]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            runs.append(json.loads(said.splitlines()[-1]))
            _save(runs)
    _show(runs)


def _save(runs: list[dict[str, Any]]) -> None:
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "system": platform.platform(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "versions": {
            "calibrant": cb.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numba": numba.__version__,
        },
        "runs": runs,
    }
    file = RESULTS / f"estimates_{torch.backends.cpu.get_cpu_capability().lower()}.json"
    file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _show(runs: list[dict[str, Any]]) -> None:
    table = Table("model", "recipe", "seconds", "was", "memory", "was", "disk", "was", "output", "was")
    for run in runs:
        said, was = run["estimated"], run["measured"]
        low, high = said["seconds"]
        sizes = [
            f"{one[key] / 1e6:.0f} MB" for key in ("memory_bytes", "disk_bytes", "output_bytes") for one in (said, was)
        ]
        table.add_row(run["model"], run["recipe"], f"{low:.0f} to {high:.0f}", f"{was['wall_seconds']:.0f}", *sizes)
    Console(width=shutil.get_terminal_size((140, 24)).columns).print(table)


if __name__ == "__main__":
    main()
