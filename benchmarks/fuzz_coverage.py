"""The project's readers under a coverage-guided fuzzer.

    pip install atheris
    python benchmarks/fuzz_coverage.py WORK --seconds 60     # for each reader
    python benchmarks/fuzz_coverage.py WORK --seconds 60 --reader recipe

libFuzzer keeps inputs that reach new branches of our code and changes them further; every second change is one of
damage.py. Kernels are not instrumented: Numba compiles their bytecode. Failures are those of ``fuzz_readers.py``. A
reader begins again behind each failure, with another seed; inputs that fail are kept in WORK. The result is written to
``results/fuzz_coverage.json``.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import atheris

SOURCE = Path(__file__).parent.parent / "src"
COMPILED = [
    ".".join(file.relative_to(SOURCE).with_suffix("").parts)
    for file in (SOURCE / "calibrant").rglob("*.py")
    if "import numba" in file.read_text() or "kernels" in file.parts
]
with atheris.instrument_imports(include=["calibrant"], exclude=COMPILED):
    from calibrant.errors import CalibrantError
    from damage import flipped
    from fuzz_readers import READERS, write_sound_files

RESULT = Path(__file__).parent / "results" / "fuzz_coverage.json"
_SECONDS, _FLOOR, _TIMES_INPUT = 10, 256_000_000, 10
_MOST_FAILURES = 10
_SHOWN = re.compile(r"#(\d+)\s+\S+\s+cov: (\d+)")


def fuzz(name: str, folder: Path, options: list[str]) -> None:
    """Fuzz one reader in ``folder``, which has sound files; ends the process."""
    reader = next(one for one in READERS if one.name == name)
    file = folder / reader.file
    sound = file.read_bytes()
    peak = [0]

    def test(data: bytes) -> None:
        file.write_bytes(data)
        with contextlib.suppress(CalibrantError):
            reader.read(file)
        now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if peak[0] and (now - peak[0]) * 1024 > _FLOOR + _TIMES_INPUT * len(data):
            raise MemoryError(f"{(now - peak[0]) / 1e3:.0f} MB more")
        peak[0] = max(peak[0], now)

    def change(data: bytes, most: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.5:
            return bytes(atheris.Mutate(data, most))
        try:
            return rng.choice(reader.mutators)(data or sound, rng)[:most]
        except Exception:  # it is no longer such a file
            return flipped(data or sound, rng)[:most]

    with atheris.instrument_imports(include=["calibrant"], exclude=COMPILED):
        test(sound)  # which imports the rest
    atheris.Setup([sys.argv[0], *options], test, custom_mutator=change)
    atheris.Fuzz()


def of_reader(name: str, given: argparse.Namespace, template: Path) -> dict[str, Any]:
    """Inputs, branches reached and failures of one reader."""
    reader = next(one for one in READERS if one.name == name)
    place = Path("/dev/shm" if Path("/dev/shm").is_dir() else given.work) / f"coverage-{os.getpid()}"
    found: dict[str, Any] = {"reader": name, "inputs": 0, "branches": 0, "failures": {}}
    end = time.monotonic() + given.seconds
    seed = given.seed + 1
    while (left := int(end - time.monotonic())) > 0 and len(found["failures"]) < _MOST_FAILURES:
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(template, place / "own")
        corpus = place / "corpus"
        corpus.mkdir()
        (corpus / "sound").write_bytes((template / reader.file).read_bytes())
        before = set(place.iterdir()) | set(place.parent.iterdir())
        size = max(4096, 4 * (template / reader.file).stat().st_size)
        options = [f"-max_total_time={left}", f"-seed={seed}", f"-max_len={size}", f"-timeout={_SECONDS}"]
        options += ["-rss_limit_mb=0", "-print_final_stats=1", f"-artifact_prefix={place}/failed-", str(corpus)]
        command = [sys.executable, __file__, str(given.work), "--one", name, str(place / "own"), json.dumps(options)]
        ran = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        shown = [(int(runs), int(branches)) for runs, branches in _SHOWN.findall(ran.stderr)]
        if not shown:
            raise SystemExit(f"{name}: {ran.stderr[-2000:]}")
        found["inputs"] += max(runs for runs, _ in shown)
        found["branches"] = max(found["branches"], *(branches for _, branches in shown))
        outside = (set(place.iterdir()) | set(place.parent.iterdir())) - before
        kept = [path for path in outside if path.name.startswith("failed-")]
        for path in outside:
            if path not in kept and not path.name.startswith(("coverage-", "fuzz-")):
                found["failures"][f"a file outside: {path.name}"] = ""
        if ran.returncode:
            said = [line for line in ran.stderr.splitlines() if re.match(r"[A-Za-z.]*(Error|Exception)\b", line)]
            why = said[-1][:200] if said else ran.stderr.strip().splitlines()[-1][:200]
            for path in kept:
                target = given.work / f"{name}-{seed}".replace(" ", "-")
                target.write_bytes(path.read_bytes())
                found["failures"].setdefault(f"{ran.returncode}: {why}", target.name)
        seed += 1
    shutil.rmtree(place, ignore_errors=True)
    print(json.dumps(found), flush=True)
    return found


def main() -> None:
    """Fuzz every reader in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for sound files and inputs that fail, which must not exist")
    parser.add_argument("--seconds", type=int, default=60, help="for each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", help="this one alone")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        fuzz(given.one[0], Path(given.one[1]), json.loads(given.one[2]))
        return
    given.work = given.work.absolute()
    given.work.mkdir(parents=True)
    template = given.work / "sound"
    making = multiprocessing.get_context("spawn").Process(target=write_sound_files, args=(template,))
    making.start()
    making.join()
    if making.exitcode:
        sys.exit("the sound files could not be written")
    found = [of_reader(one.name, given, template) for one in READERS if given.reader in (None, one.name)]
    failures = sum(len(one["failures"]) for one in found)
    print(f"{sum(one['inputs'] for one in found)} inputs, {failures} kinds of failures")
    if given.reader is None:
        date = datetime.now(UTC).date().isoformat()
        result = {"date": date, "seed": given.seed, "seconds": given.seconds, "readers": found}
        RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    sys.exit(min(failures, 255))


if __name__ == "__main__":
    main()
