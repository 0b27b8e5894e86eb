"""What the journal, and hidden states in files, add to the time of a compression.

    python benchmarks/streaming_cost.py MODEL [--recipe gptq-w4a16] [--repeats 5]

Each run is a process of its own, and the kinds of runs alternate: "in memory" saves no state and keeps hidden states in
memory, "journal" is a run as users start it, and "journal and files" may use so little memory that hidden states are in
files and blocks run again for each of their stages (``--memory``). All write the same bytes. Let nothing else run.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

import calibrant as cb
from calibrant import checkpoint_interval
from calibrant.hashing import sha256_file
from calibrant.modeling.checkpoint import ModelFolder

RESULT = Path(__file__).parent / "results" / "streaming_cost.json"
KINDS = ("in memory", "journal", "journal and files")


def one_run(kind: str, model: str, recipe: str, calibration: str, dtype: str) -> dict[str, Any]:
    """Seconds of one run, by the clock and by stage, and a hash of its weights."""
    if kind == "in memory":
        checkpoint_interval.CHECKPOINT_SHARE = 10**9
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        report = cb.compress(
            model,
            output=Path(folder) / "out",
            recipe=recipe,
            calibration=calibration,
            dtype=dtype,
            memory="1MB" if kind == "journal and files" else "64GB",
        )
        seconds = time.perf_counter() - begin
        weights = sha256_file(Path(folder) / "out" / "model.safetensors")
    return {"seconds": round(seconds, 2), "stages": report.seconds, "weights": weights}


def main() -> None:
    """Alternate the kinds of runs and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--recipe", default="gptq-w4a16")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        kind, calibration = given.one
        print(json.dumps(one_run(kind, given.model, given.recipe, calibration, given.dtype)))
        return
    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        numbers = torch.Generator().manual_seed(0)
        vocabulary = ModelFolder(given.model).vocabulary
        tokens = torch.randint(0, vocabulary, (given.samples, given.length), generator=numbers)
        cb.CalibrationSet.from_tokens(tokens).save(f"{folder}/set")
        for _ in range(given.repeats):
            for kind in KINDS:
                command = [sys.executable, __file__, given.model, "--one", kind, f"{folder}/set"]
                command += ["--recipe", given.recipe, "--dtype", given.dtype]
                said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                runs[kind].append(json.loads(said.splitlines()[-1]))
                print(kind, runs[kind][-1]["seconds"], file=sys.stderr, flush=True)
    hashes = {run["weights"] for found in runs.values() for run in found}
    if len(hashes) > 1:
        raise SystemExit("the runs wrote different weights")
    table = Table("run", "median seconds", "of in memory", "seconds")
    result = {}
    base = statistics.median(run["seconds"] for run in runs["in memory"])
    for kind, found in runs.items():
        seconds = [run["seconds"] for run in found]
        ratio = statistics.median(seconds) / base
        result[kind] = {
            "ratio": round(ratio, 3),
            "runs": [{k: v for k, v in one.items() if k != "weights"} for one in found],
        }
        table.add_row(kind, f"{statistics.median(seconds):.1f}", f"{ratio:.3f}", ", ".join(map(str, seconds)))
    Console(width=shutil.get_terminal_size((120, 24)).columns).print(table)
    everything = {
        "date": datetime.now(UTC).date().isoformat(),
        "system": platform.platform(),
        "processors": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "versions": {
            "calibrant": cb.__version__, "torch": torch.__version__, "transformers": transformers.__version__,
        },
        "model": Path(given.model).name,
        "recipe": given.recipe,
        "samples": given.samples,
        "length": given.length,
        "dtype": given.dtype,
        "kinds": result,
    }  # fmt: skip
    RESULT.write_text(json.dumps(everything, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
