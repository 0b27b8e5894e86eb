"""A run on a quiet machine, and beside a program that keeps one core busy, by how OpenMP's threads wait.

    python benchmarks/busy_neighbour.py MODEL

"passive" is what Calibrant sets; "spinning" is what libgomp does by itself (GOMP_SPINCOUNT=300000). Runs take turns.
"""

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import calibrant as cb

HERE = Path(__file__).parent
POLICIES = {"passive": {"OMP_WAIT_POLICY": "passive"}, "spinning": {"GOMP_SPINCOUNT": "300000"}}


@contextmanager
def neighbour(busy: bool) -> Iterator[None]:
    """Within the context another process computes all the time, if ``busy``."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        yield
    finally:
        if process is not None:
            process.kill()
            process.wait()


def run(model: Path, recipe: str, calibration: Path, output: Path, policy: dict[str, str]) -> dict[str, float]:
    """One compression in a process of its own: seconds on the clock and of the processor."""
    command = [sys.executable, "-m", "calibrant", "compress", str(model), "-r", recipe, "-c", str(calibration)]
    command += ["-o", str(output), "--overwrite", "--quiet"]
    begin = time.perf_counter()
    process = subprocess.Popen(command, env={**os.environ, **policy}, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status):
        sys.exit("the run failed")
    return {"wall_seconds": time.perf_counter() - begin, "cpu_seconds": usage.ru_utime + usage.ru_stime}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--recipe", default="gptq-w4a16")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=HERE / "results" / "busy_neighbour.json")
    options = parser.parse_args()
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        calibration, output = Path(folder) / "set", Path(folder) / "out"
        cb.select("builtin", tokenizer=options.model, samples=options.samples, length=options.length).save(calibration)
        run(options.model, options.recipe, calibration, output, POLICIES["passive"])  # compiles the kernels
        for number in range(options.rounds):
            for busy in (False, True):
                for name, policy in POLICIES.items():
                    with neighbour(busy):
                        measured = run(options.model, options.recipe, calibration, output, policy)
                    found.append({"threads": name, "busy": busy, "round": number, **measured})
                    print(f"{name}, {'busy' if busy else 'quiet'}: {measured['wall_seconds']:.1f} s", flush=True)
    medians = {
        f"{name}, {'busy' if busy else 'quiet'}": statistics.median(
            one["wall_seconds"] for one in found if (one["threads"], one["busy"]) == (name, busy)
        )
        for name in POLICIES
        for busy in (False, True)
    }
    print({name: round(seconds, 1) for name, seconds in medians.items()})
    versions = {name: importlib.metadata.version(name) for name in ("calibrant", "torch", "numba")}
    settings = {"model": options.model.resolve().name, "recipe": options.recipe, "samples": options.samples}
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "cores": os.cpu_count(),
        "versions": versions,
        "settings": {**settings, "length": options.length},
        "median_wall_seconds": medians,
        "runs": found,
    }
    options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
