"""What ``--dry-run`` says beside what the run then takes: time, memory, disk.

    python benchmarks/estimates.py MODEL...          # results/estimates_avx512.json on such a processor

Estimate and run are commands, as a user gives them, and the seconds are those of the whole command. The estimate is for
an idle machine with the model in the system's cache, so let nothing else run.
"""

import argparse
import json
import os
import platform
import resource
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

RECIPES = ["rtn-w8a16", "gptq-w4a16", "wanda-2:4", "smoothquant-w8a8"]
RESULTS = Path(__file__).parent / "results"


def measure(model: str, recipe: str, samples: int, length: int, dtype: str) -> dict[str, Any]:
    """Estimate one compression, run it, and put both side by side."""
    numbers = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, ModelFolder(model).vocabulary, (samples, length), generator=numbers)
    with tempfile.TemporaryDirectory() as folder:
        cb.CalibrationSet.from_tokens(tokens).save(f"{folder}/set")
        place = Path(folder) / "run"
        place.mkdir()
        command = [str(Path(sys.executable).with_name("calibrant")), "compress", model, "-o", f"{place}/out"]
        command += ["-r", recipe, "-c", f"{folder}/set", "--dtype", dtype, "--json", "--quiet"]
        begin = time.perf_counter()
        said = json.loads(subprocess.check_output([*command, "--dry-run"]))
        estimating, begin = time.perf_counter() - begin, time.perf_counter()
        most, done = [0], threading.Event()
        watcher = threading.Thread(target=_watch, args=(place, most, done))
        watcher.start()
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        report = json.loads(subprocess.check_output(command))
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        wall = time.perf_counter() - begin
        done.set()
        watcher.join()
    return {
        "model": Path(model).name,
        "recipe": recipe,
        "samples": samples,
        "length": length,
        "dtype": dtype,
        "estimated": {name: said[name] for name in ("seconds", "memory_bytes", "output_bytes", "disk_bytes")},
        "measured": {
            "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
            "wall_seconds": round(wall, 1),
            "memory_bytes": report["peak_memory_bytes"],
            "output_bytes": report["bytes_after"],
            "disk_bytes": most[0],
        },
        "stages": report["seconds"],
        "seconds_to_estimate": round(estimating, 1),
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
    given = parser.parse_args()
    recipes = given.recipe or RECIPES
    runs = []
    for model in given.models:
        for file in Path(model).glob("*.safetensors"):
            file.read_bytes()  # into the system's cache
        for recipe in recipes:
            runs.append(measure(model, recipe, given.samples, given.length, given.dtype))
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
