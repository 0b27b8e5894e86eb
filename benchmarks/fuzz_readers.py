"""A million damaged files, read by the project's readers alone, a thousand a second.

    python benchmarks/fuzz_readers.py WORK --seconds 60     # for each reader; files are damaged as damage.py does
    python benchmarks/fuzz_readers.py WORK --seconds 60 --reader recipe

``benchmarks/fuzz.py`` runs whole commands, five a second. Here a process for each reader writes a damaged file, reads
it, and goes on. Failures are exceptions other than ``CalibrantError``, deaths by a signal, more than 10 seconds, more
memory than ten times the input and 256 MB, and files that appear outside the reader's folder. Inputs that fail are kept
in WORK, one for each kind of failure; the result is added to ``results/fuzz_readers.json``.
"""

import argparse
import concurrent.futures
import gzip
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch

import calibrant as cb
from calibrant.errors import CalibrantError
from calibrant.evaluation.recorded import save_evaluation
from calibrant.journal import Journal
from damage import (
    Mutator,
    body_changed,
    cut,
    flipped,
    grown,
    header_changed,
    json_changed,
    lines_changed,
    yaml_changed,
)
from fuzz import write_template

RESULT = Path(__file__).parent / "results" / "fuzz_readers.json"
_BYTES = (flipped, cut, grown)
_SECONDS, _FLOOR, _TIMES_INPUT = 10, 256_000_000, 10
_MOST_DEATHS = 10
_STUDY = """name: tiny
description: Does it matter?
models: demo
sources:
  python: {corpus: builtin}
  self: {strategy: self}
draws: 2
samples: 8
length: 128
recipes: [gptq-w4a16-g64, "wanda-2:4"]
texts:
  methods: {corpus: builtin, length: 256, windows: 4}
"""


@dataclass(frozen=True)
class Reader:
    """A reader, the sound file in the template folder that it is given damaged, and how that is damaged."""

    name: str
    file: str
    mutators: tuple[Mutator, ...]
    read: Callable[[Path], object]


@dataclass
class Found:
    """What came of one reader: inputs read, how many were accepted, and failures by kind."""

    reader: str
    inputs: int = 0
    accepted: int = 0
    slowest_seconds: float = 0.0
    failures: dict[str, str] = field(default_factory=dict)


def _folder(path: Path) -> object:
    from calibrant.modeling.checkpoint import ModelFolder

    return ModelFolder(path.parent)


def _decoded(path: Path) -> object:
    from calibrant.modeling.checkpoint import ModelFolder

    folder = ModelFolder(path.parent, dequantize=True)
    return [folder.read(name) for name in list(folder.tensors)[:4]]


def _tensors(path: Path) -> object:
    from calibrant.modeling.checkpoint import ModelFolder
    from calibrant.modeling.weight_files import find_weights

    folder = object.__new__(ModelFolder)
    folder._files = find_weights(path.parent).tensors
    return [folder._read(name) for name in list(folder._files)[:4]]


def _corpus(path: Path) -> object:
    return list(cb.Corpus(path))


def _conversations(path: Path) -> object:
    return list(cb.Corpus(path, "messages"))


def _tokenizer(path: Path) -> object:
    from calibrant.modeling.tokenizer import Tokenizer

    return Tokenizer(path.parent).encode("the quick brown fox")


def _rounding(path: Path) -> object:
    from calibrant.formats.input_rounding import read_input_rounding

    return read_input_rounding(path.parent)


def _journal(path: Path) -> object:

    output = path.parent.with_name(path.parent.name.removesuffix(".journal"))
    return Journal(output, {}, False).read("blocks")


def _status(path: Path) -> object:
    return cb.status(path.parent.with_name(path.parent.name.removesuffix(".journal")))


def _evaluation(path: Path) -> object:
    from calibrant.evaluation.recorded import saved_evaluation

    return saved_evaluation(path.parent, path.parent / "calibrant.json")


def _ranges(path: Path) -> object:
    from calibrant.formats.safetensors_file import stored_tensors

    try:
        return stored_tensors(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:  # as it says
        raise CalibrantError(str(error)) from error


def _packed_lines_changed(data: bytes, rng: random.Random) -> bytes:
    return gzip.compress(lines_changed(gzip.decompress(data), rng), 1)


_JSON, _TENSORS = (json_changed, json_changed, *_BYTES), (header_changed, header_changed, body_changed, *_BYTES)
READERS = (
    Reader("config", "model/config.json", _JSON, _folder),
    Reader("weights", "model/model.safetensors", _TENSORS, _tensors),
    Reader("tensor ranges", "model/model.safetensors", _TENSORS, _ranges),
    Reader("index", "sharded/model.safetensors.index.json", _JSON, _folder),
    Reader("quantized config", "quantized/config.json", _JSON, _decoded),
    Reader("quantized weights", "quantized/model.safetensors", _TENSORS, _decoded),
    Reader("tokenizer", "model/tokenizer.json", _JSON, _tokenizer),
    Reader("tokenizer settings", "model/tokenizer_config.json", _JSON, _tokenizer),
    Reader("manifest", "set/manifest.json", _JSON, lambda path: cb.CalibrationSet.load(path.parent)),
    Reader("tokens", "set/tokens.safetensors", _TENSORS, lambda path: cb.CalibrationSet.load(path.parent)),
    Reader("recipe", "recipe.yaml", (yaml_changed, yaml_changed, *_BYTES), cb.load_recipe),
    Reader("study", "study.yaml", (yaml_changed, yaml_changed, *_BYTES), cb.load_study_plan),
    Reader("record", "output/calibrant.json", _JSON, lambda path: cb.RunRecord.read(path.parent)),
    Reader("report", "output/report.json", _JSON, lambda path: cb.RunReport.read(path.parent)),
    Reader("evaluation", "output/evaluation.json", _JSON, _evaluation),
    Reader("input rounding", "rounded/input_rounding.json", _JSON, _rounding),
    Reader("journal's identity", "run.journal/run.json", _JSON, _status),
    Reader("journal's state", "run.journal/blocks.safetensors", _TENSORS, _journal),
    Reader("status", "run.journal/blocks.safetensors", _TENSORS, _status),
    Reader("text", "text.txt", _BYTES, _corpus),
    Reader("json lines", "text.jsonl", (lines_changed, lines_changed, *_BYTES), _corpus),
    Reader("conversations", "chat.jsonl", (lines_changed, lines_changed, *_BYTES), _conversations),
    Reader("parquet", "text.parquet", _BYTES, _corpus),
    Reader("gzip", "text.jsonl.gz", (_packed_lines_changed, _packed_lines_changed, *_BYTES), _corpus),
)


def write_sound_files(folder: Path) -> None:
    """One sound file for every reader."""
    write_template(folder)
    (folder / "study.yaml").write_text(_STUDY)
    made = next(path for path in (folder / "set").iterdir() if path.suffix == ".safetensors")
    if made.name != "tokens.safetensors":
        raise SystemExit(f"the set's tensors are in {made.name}")
    cb.compress(
        folder / "model", recipe="rtn-w8a16", bits=4, group_size=32, output=folder / "quantized", dtype="float32"
    )
    measured = cb.evaluate(folder / "output", against=folder / "model", text=folder / "text.txt", length=16, limit=2)
    save_evaluation(folder / "output", folder / "output" / "calibrant.json", measured)
    journal = folder / "run.journal"
    journal.mkdir()
    identity = {"recipe": {"name": "r"}, "model": {"weights_sha256": "0"}}
    (journal / "run.json").write_text(json.dumps(identity))
    Journal(folder / "run", identity, False).write("blocks", {"done": 1, "blocks": 2, "walk": [torch.ones(4, 4)]})


class _TooLongError(BaseException):
    pass


class Trial:
    """One reader on one damaged file after another, in this process."""

    def __init__(self, reader: Reader, work: Path, folder: Path, progress: Any) -> None:
        self.reader, self.work, self.progress = reader, work, progress
        self.found = Found(reader.name)
        self._file = folder / reader.file
        self.sound = self._file.read_bytes()
        self._peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        signal.signal(signal.SIGALRM, self._too_long)

    @staticmethod
    def _too_long(number: int, frame: Any) -> None:
        raise _TooLongError

    def read(self, data: bytes) -> None:
        """Read a file with ``data``."""
        self._file.write_bytes(data)
        self.progress.value += 1
        begin = time.perf_counter()
        failure = None
        signal.alarm(_SECONDS)
        try:
            self.reader.read(self._file)
            self.found.accepted += 1
        except CalibrantError:
            pass
        except _TooLongError:
            failure = f"more than {_SECONDS} s"
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            failure = f"{type(error).__name__} in {Path(place.filename).name}:{place.name}"
        finally:
            signal.alarm(0)
        self.found.slowest_seconds = max(self.found.slowest_seconds, round(time.perf_counter() - begin, 2))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if failure is None and (peak - self._peak) * 1024 > _FLOOR + _TIMES_INPUT * len(data):
            failure = f"{(peak - self._peak) / 1e3:.0f} MB more"
        self._peak = max(peak, self._peak)
        if failure is not None and failure not in self.found.failures:
            kept = self.work / f"{self.reader.name}-{len(self.found.failures)}"
            kept.write_bytes(data)
            self.found.failures[failure] = kept.name


def damaged(trial: Trial, seconds: float, seed: int) -> None:
    """Read files damaged at random for so many seconds."""
    end, number = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        rng = random.Random(f"{seed}:{number}")
        data = trial.sound
        for _ in range(rng.choice((1, 1, 2))):
            try:
                data = rng.choice(trial.reader.mutators)(data, rng)
            except Exception:  # what was damaged before is no such file
                data = flipped(data, rng)
        trial.read(data)
        number += 1


def folder_of(process: int, options: argparse.Namespace) -> Path:
    """Where a process works, in memory if possible."""
    return Path("/dev/shm" if Path("/dev/shm").is_dir() else options.work) / f"fuzz-{process}"


def work_on(number: int, options: argparse.Namespace, template: Path, results: Any, progress: Any) -> None:
    """One reader, in a process of its own."""
    reader = READERS[number]
    torch.set_num_threads(1)
    folder = folder_of(os.getpid(), options)
    shutil.copytree(template, folder / "own")
    before = set(folder.parent.iterdir())
    trial = Trial(reader, options.work, folder / "own", progress)

    def done(*_: Any) -> None:
        outside = {path for path in folder.iterdir() if path.name != "own"} | (
            {path for path in folder.parent.iterdir() if not path.name.startswith("fuzz-")} - before
        )
        for path in outside:
            trial.found.failures[f"a file outside: {path}"] = ""
        trial.found.inputs = 0  # counted by the parent
        results.put(asdict(trial.found))
        results.close()
        results.join_thread()
        shutil.rmtree(folder, ignore_errors=True)

    damaged(trial, options.seconds, options.seed)
    done()


def of_reader(number: int, options: argparse.Namespace, template: Path, context: Any) -> Found:
    """What came of one reader, whose process is started again where an input kills it."""
    reader = READERS[number]
    total, end = Found(reader.name), time.monotonic() + options.seconds
    seed = options.seed
    while (left := end - time.monotonic()) > 0 and len(total.failures) < _MOST_DEATHS:
        results, progress = context.Queue(), context.Value("q", 0)
        asked = argparse.Namespace(**{**vars(options), "seconds": left, "seed": seed})
        process = context.Process(target=work_on, args=(number, asked, template, results, progress))
        process.start()
        process.join()
        seed += 1
        total.inputs += progress.value
        if process.exitcode == 0:
            one = Found(**results.get())
            total.accepted += one.accepted
            total.slowest_seconds = max(total.slowest_seconds, one.slowest_seconds)
            total.failures |= one.failures
            break
        folder = folder_of(process.pid, options)
        last = folder / "own" / reader.file
        if not last.is_file():
            raise SystemExit(f"{reader.name}: its process ended before it read anything")
        kept = options.work / f"{reader.name}-death-{seed}"
        kept.write_bytes(last.read_bytes())
        total.failures[f"the process ended with {process.exitcode}, {seed - options.seed}"] = kept.name
        shutil.rmtree(folder)
    print(json.dumps(asdict(total)), flush=True)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for sound files and inputs that fail, which must not exist")
    parser.add_argument("--seconds", type=float, default=60, help="for each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", help="this one alone")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    options.work = options.work.absolute()
    options.work.mkdir(parents=True)
    context = multiprocessing.get_context("spawn")
    template = options.work / "sound"
    making = context.Process(target=write_sound_files, args=(template,))
    making.start()
    making.join()
    if making.exitcode:
        sys.exit("the sound files could not be written")
    chosen = [number for number, one in enumerate(READERS) if options.reader in (None, one.name)]
    with concurrent.futures.ThreadPoolExecutor(options.processes) as pool:
        found = list(pool.map(lambda number: of_reader(number, options, template, context), chosen))
    inputs, failures = sum(one.inputs for one in found), sum(len(one.failures) for one in found)
    print(f"{inputs} inputs, {failures} kinds of failures")
    runs = json.loads(RESULT.read_text()) if RESULT.is_file() else []
    runs.append(
        {
            "date": datetime.now(UTC).date().isoformat(),
            "seed": options.seed,
            "seconds": options.seconds,
            "inputs": inputs,
            "readers": [asdict(one) for one in found],
        }
    )
    RESULT.write_text(json.dumps(runs, indent=2) + "\n", encoding="utf-8")
    sys.exit(min(failures, 255))


if __name__ == "__main__":
    main()
