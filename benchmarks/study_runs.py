"""What running a study costs beside its cells, and whether it survives being killed.

    python benchmarks/study_runs.py MODEL

200 cells of MODEL run as a study, in a process of one thread for each processor, and again in such processes that only
run one after the other: what the study takes longer is scheduling and storage. A study of 12 cells is then killed ten
times at random moments, resumed, and compared with one that ran through; the same on a local Ray cluster, of which a
worker is killed ten times. Let nothing else run.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numba
import psutil
import torch
import transformers
import yaml
from rich.console import Console

import calibrant as cb
from calibrant.progress import NoProgress
from calibrant.study.cache import Cache
from calibrant.study.resolve import resolve
from calibrant.study.steps import CellStep
from calibrant.study.worker_process import passive_threads, prepare_process

RESULT = Path(__file__).parent / "results" / "study_runs.json"
RECIPES = ["rtn-w8a16", "wanda-2:4"]
KILLS = 10
FIRST = 10


def write_plan(folder: Path, model: str, draws: int) -> Path:
    """A study of 4 cells a draw, each of 16 x 128 tokens."""
    plan = {
        "name": "killed",
        "models": str(Path(model).absolute()),
        "sources": {"text": {"corpus": "builtin"}, "vocabulary": {"strategy": "vocabulary"}},
        "draws": draws,
        "samples": 16,
        "length": 128,
        "recipes": RECIPES,
        "texts": {"held-out": {"corpus": "builtin", "length": 128, "windows": 16}},
        "repeat": False,
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(plan))
    return folder / "study.yaml"


def start(plan: Path, output: Path, cache: Path, *more: str) -> subprocess.Popen[bytes]:
    """Run the study in a group of processes of its own."""
    command = [sys.executable, "-c", "from calibrant.cli.main import main; main()", "study", "run", plan]
    options = ["-o", output, "--cache", cache, "--quiet", *more]
    return subprocess.Popen([*command, *map(str, options)], start_new_session=True)


def content(study: Path) -> list[Any]:
    """Everything in a store but times and memory."""
    with contextlib.closing(sqlite3.connect(study / "study.sqlite")) as connection:
        found = [list(connection.execute(f"SELECT * FROM {table}")) for table in ("cells", "measures", "items")]
    return [sorted(rows, key=str) for rows in found]


def overhead(model: str, folder: Path, _: random.Random) -> dict[str, Any]:
    """The clock of a study's cells beside that of the same cells in processes that only run them."""
    workers, plan, cache = os.cpu_count() or 1, write_plan(folder, model, draws=50), folder / "cache"
    start(plan, folder / "study", cache, "--workers", str(workers)).wait()
    resolved = resolve(cb.load_study_plan(plan), Cache(cache), NoProgress())
    steps = [work.step for work in resolved.cells]
    plain = folder / "plain"
    for kind in ("sets", "originals"):
        shutil.copytree(cache / kind, plain / kind)
    context = multiprocessing.get_context("spawn")
    loops = [context.Process(target=run_all, args=(steps[one::workers], plain)) for one in range(workers)]
    with passive_threads():
        for loop in loops:
            loop.start()
    for loop in loops:
        loop.join()
    took, alone = (seconds_of_cells(steps, one) for one in (cache, plain))
    return {
        "cells": len(steps),
        "workers": workers,
        "seconds": round(took, 2),
        "seconds_without_scheduling": round(alone, 2),
        "overhead_ms_a_cell": round(1000 * workers * (took - alone) / (len(steps) - FIRST), 2),
        "overhead_share": round(took / alone - 1, 4),
    }


def run_all(steps: list[CellStep], cache: Path) -> None:
    """Run cells one after the other."""
    prepare_process(1)
    for step in steps:
        step.run(Cache(cache))


def seconds_of_cells(steps: list[CellStep], cache: Path) -> float:
    """From the last of the ``FIRST`` cells, which still load and compile, to the last one."""
    ended = sorted((cache / "results" / f"{step.result_keys()[-1]}.json").stat().st_mtime for step in steps)
    return ended[-1] - ended[FIRST - 1]


def kills(model: str, folder: Path, rng: random.Random) -> dict[str, Any]:
    """Kill the whole study with ever more results in its cache, each time a moment later, resume it, and compare."""
    plan, whole, killed = write_plan(folder, model, draws=3), folder / "whole", folder / "killed"
    start(plan, whole, folder / "cache whole").wait()
    results = [*(folder / "cache whole" / "results").iterdir()]
    found = []
    for least in sorted(rng.sample(range(len(results)), KILLS)):
        process = start(plan, killed, folder / "cache")
        while process.poll() is None and len([*(folder / "cache").glob("results/*.json")]) < least:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        found.append(len([*(folder / "cache").glob("results/*.json")]))
    start(plan, killed, folder / "cache").wait()
    kinds = ("sets", "originals", "outputs")
    return {
        "results_in_all": len(results),
        "results_when_killed": found,
        "equal": content(killed) == content(whole),
        "left_over": len([one for kind in kinds for one in (folder / "cache" / kind).glob(".*")]),
    }


def ray_kills(model: str, folder: Path, rng: random.Random) -> dict[str, Any]:
    """Kill a worker of a local Ray cluster with ever more results in the cache, and compare; run again what failed.

    A step whose worker is killed four times fails.
    """
    plan = write_plan(folder, model, draws=3)
    start(plan, folder / "whole", folder / "cache whole").wait()
    results = [*(folder / "cache whole" / "results").iterdir()]
    process = start(plan, folder / "ray", folder / "cache", "--executor", "ray")
    parent, killed = psutil.Process(process.pid), 0
    for least in sorted(rng.sample(range(len(results)), KILLS)):
        while process.poll() is None and len([*(folder / "cache").glob("results/*.json")]) < least:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5))
        with contextlib.suppress(psutil.Error):
            workers = [one for one in parent.children(recursive=True) if one.name().startswith("ray::_run_on_ray")]
            if workers:
                rng.choice(workers).kill()
                killed += 1
    process.wait()
    failed = cb.Study(folder / "ray").counts()["failed"]
    if failed:
        start(plan, folder / "ray", folder / "cache", "--executor", "ray").wait()
    equal = content(folder / "ray") == content(folder / "whole")
    return {"workers_killed": killed, "cells_failed_then": failed, "equal": equal}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    model, console, rng = parser.parse_args().model, Console(), random.Random(0)
    found: dict[str, Any] = {}
    for part in (overhead, kills, ray_kills):
        folder = Path(tempfile.mkdtemp())
        found[part.__name__] = part(model, folder, rng)
        shutil.rmtree(folder)
        console.print(part.__name__, found[part.__name__])
    about = {
        "date": datetime.now(UTC).date().isoformat(),
        "processor": platform.processor() or platform.machine(),
        "processors": os.cpu_count(),
        "model": Path(model).name,
        "versions": {one.__name__: one.__version__ for one in (cb, torch, transformers, numba)},
    }
    RESULT.write_text(json.dumps({**about, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
