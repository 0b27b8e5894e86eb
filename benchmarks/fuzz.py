"""Damaged files of every kind that strangers make, read by the public commands.

    python benchmarks/fuzz.py WORK --count 2000
    python benchmarks/fuzz.py WORK --seed 0 --first 137 --count 1    # one again; its files stay in WORK

Every mutation depends on the seed and its number alone, so a run is continued with ``--first``. Each runs in a forked
child of one warm process. Failures are exceptions that reach the top, deaths by a signal, more than ``--seconds`` of
processor time (or four times that on the clock, so that a busy machine is no failure), and more memory than ten times
the input, or 256 MB, above what the same command needs for the sound file. The summary is written to
``WORK/summary.json``; the exit status is the number of failures, 255 at most.
"""

import argparse
import gzip
import importlib
import json
import os
import pkgutil
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
from tests.conftest import random_set, write_model

import calibrant as cb
from calibrant.cli.main import main as calibrant
from damage import (
    Mutator,
    body_changed,
    cut,
    flipped,
    grown,
    header_changed,
    json_changed,
    lines_changed,
    template_changed,
    unpacked_larger,
    yaml_changed,
)

_FLOOR = 256_000_000
_TIMES_INPUT = 10
_CLOCK = 4
_MOST_MEMORY = 4_000_000_000
_CRASHED = 99
_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
_RECIPE = """name: r
description: d
method: {name: rtn}
scheme:
  weights: {bits: 4, symmetric: true, group_size: 16}
ignore: ['layers\\.0\\.mlp']
"""
_TEXT = "the quick brown fox jumps over the lazy dog and goes on to the next field. "


@dataclass(frozen=True)
class Kind:
    """Files of one kind: where a sound one lies in the template folder, how it is damaged, and who reads it."""

    name: str
    file: str
    mutators: tuple[Mutator, ...]
    commands: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What one command did with one damaged file."""

    number: int
    kind: str
    command: str
    failure: str
    said: str
    seconds: float
    memory: int


_BYTES = (flipped, cut, grown)
_COMPRESS = "compress {model} -r {recipe} -o {out}"
_EVALUATE = "evaluate {model} --text {text} -l 16 --limit 1"
_SELECT = "data select {file} -m {model} -n 2 -l 16 -o {out}"
_CHAT = "data select {chat} -m {model} --field messages -n 2 -l 16 -o {out}"
_INSPECT = "data inspect {set} -m {model} --perplexity"

KINDS = (
    Kind("config", "model/config.json", (json_changed, json_changed, *_BYTES), (_COMPRESS, _EVALUATE)),
    Kind("weights", "model/model.safetensors", (header_changed, body_changed, *_BYTES), (_COMPRESS, _EVALUATE)),
    Kind(
        "index",
        "sharded/model.safetensors.index.json",
        (json_changed, *_BYTES),
        (_COMPRESS.replace("model", "sharded"),),
    ),
    Kind("tokenizer", "model/tokenizer.json", (json_changed, *_BYTES), (_CHAT, _EVALUATE)),
    Kind(
        "tokenizer settings", "model/tokenizer_config.json", (json_changed, json_changed, *_BYTES), (_CHAT, _EVALUATE)
    ),
    Kind("template", "model/chat_template.jinja", (template_changed,) * 6 + _BYTES, (_CHAT,)),
    Kind(
        "manifest",
        "set/manifest.json",
        (json_changed, json_changed, *_BYTES),
        (_INSPECT, "data rebuild {set} -o {out}"),
    ),
    Kind("tokens", "set/{tokens}", (header_changed, body_changed, *_BYTES), (_INSPECT, f"{_COMPRESS} -c {{set}}")),
    Kind("recipe", "recipe.yaml", (yaml_changed, yaml_changed, *_BYTES), (_COMPRESS,)),
    Kind("json lines", "text.jsonl", (lines_changed, *_BYTES), (_SELECT,)),
    Kind("conversations", "chat.jsonl", (lines_changed, *_BYTES), (_CHAT,)),
    Kind("text", "text.txt", _BYTES, (_SELECT,)),
    Kind("parquet", "text.parquet", _BYTES, (_SELECT,)),
    Kind(
        "gzip", "text.jsonl.gz", (unpacked_larger, *_BYTES), (_SELECT, "evaluate {model} --text {file} -l 16 --limit 1")
    ),
    Kind(
        "record", "output/calibrant.json", (json_changed, *_BYTES), ("evaluate {output} --text {text} -l 16 --limit 1",)
    ),
    Kind(
        "input rounding",
        "rounded/input_rounding.json",
        (json_changed, json_changed, *_BYTES),
        ("evaluate {rounded} --text {text} -l 16 --limit 1",),
    ),
)


def write_template(folder: Path) -> None:
    """One sound file of every kind."""
    model = write_model(folder / "model", "llama")
    (model / "chat_template.jinja").write_text(_TEMPLATE)
    write_model(folder / "sharded", "llama")
    _shard(folder / "sharded")
    rows = [{"text": _TEXT * 3, "id": number} for number in range(20)]
    (folder / "recipe.yaml").write_text(_RECIPE)
    (folder / "text.txt").write_text(_TEXT * 20)
    (folder / "text.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "text.jsonl.gz").write_bytes(gzip.compress((folder / "text.jsonl").read_bytes()))
    pq.write_table(pa.Table.from_pylist(rows), folder / "text.parquet")
    talk = [{"role": "user", "content": _TEXT}, {"role": "assistant", "content": _TEXT}]
    (folder / "chat.jsonl").write_text("\n".join(json.dumps({"messages": talk}) for _ in range(20)))
    made = cb.select(str(folder / "text.jsonl"), tokenizer=model, samples=4, length=16)
    made.save(folder / "set")
    cb.compress(model, recipe=folder / "recipe.yaml", output=folder / "output")
    rounded = write_model(folder / "gpt2", "gpt2")
    calibration = random_set(rounded, samples=2, length=16)
    cb.compress(rounded, recipe="rtn-w8a8", calibration=calibration, output=folder / "rounded")


def _shard(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(names)}
    for file in sorted(set(files.values())):
        save_file({name: tensors[name] for name in names if files[name] == file}, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def import_everything() -> None:
    """Import what the commands import, but compute nothing: threads do not survive a fork."""
    for module in pkgutil.walk_packages(cb.__path__, "calibrant."):
        if not module.name.startswith("calibrant.report"):  # the library of its charts starts threads
            importlib.import_module(module.name)
    for name in ("LlamaForCausalLM", "GPT2LMHeadModel", "PreTrainedTokenizerFast", "AutoTokenizer"):
        getattr(transformers, name)


def write_in_child(folder: Path) -> None:
    """``write_template`` in a child, so that this process computes nothing."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            write_template(folder)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    if os.waitpid(child, 0)[1]:
        sys.exit("the sound files could not be written")


def arguments(command: str, folder: Path, file: Path) -> list[str]:
    """The command line for the files in ``folder``."""
    names = {name: folder / name for name in ("model", "sharded", "set", "output", "rounded", "out")}
    files = {"recipe": folder / "recipe.yaml", "text": folder / "text.txt", "chat": folder / "chat.jsonl", "file": file}
    return [word.format(**names, **files) for word in command.split()]


def run(words: list[str], log: Path, seconds: float) -> tuple[str, float, int]:
    """What the command died of (empty if it ended well or refused), its processor seconds and its peak of bytes."""
    begin = time.perf_counter()
    child = os.fork()
    if child == 0:
        _be_the_command(words, log)
    failure = ""
    while True:
        ended, status, usage = os.wait4(child, os.WNOHANG)
        if ended:
            break
        if _processor_seconds(child) > seconds or time.perf_counter() - begin > _CLOCK * seconds:
            failure = f"more than {seconds:g} s"
            os.kill(child, signal.SIGKILL)
            _, status, usage = os.wait4(child, 0)
            break
        if _resident(child) > _MOST_MEMORY:  # a limit of address space would stop V8, which draws the charts
            failure = f"more than {_MOST_MEMORY / 1e9:g} GB"
            os.kill(child, signal.SIGKILL)
            _, status, usage = os.wait4(child, 0)
            break
        time.sleep(0.01)
    taken = usage.ru_utime + usage.ru_stime
    if not failure and os.WIFSIGNALED(status):
        failure = signal.Signals(os.WTERMSIG(status)).name
    elif not failure and os.WEXITSTATUS(status) not in (0, 2):
        failure = "traceback" if os.WEXITSTATUS(status) == _CRASHED else f"exit status {os.WEXITSTATUS(status)}"
    return failure, taken, usage.ru_maxrss * 1024


def _resident(process: int) -> int:
    """Bytes of memory that the process has now."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * resource.getpagesize()


def _processor_seconds(process: int) -> float:
    """Seconds of user and system time of the process and of its children that ended."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def _be_the_command(words: list[str], log: Path) -> None:
    """Run the command and leave the process."""
    status = _CRASHED
    try:
        with log.open("w") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        sys.argv = ["calibrant", *words]
        calibrant()
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def baselines(work: Path, template: Path, tokens: str) -> dict[tuple[str, str], int]:
    """Peak memory of every command on the sound files, which must all be read."""
    found = {}
    for kind in KINDS:
        for command in kind.commands:
            file = template / kind.file.format(tokens=tokens)
            shutil.rmtree(template / "out", ignore_errors=True)
            failure, _, memory = run(arguments(command, template, file), work / "log.txt", 120)
            if failure or "calibrant: " in (work / "log.txt").read_text(errors="replace"):
                sys.exit(f"{command} on sound files: {failure}\n{(work / 'log.txt').read_text(errors='replace')}")
            found[kind.name, command] = memory
    shutil.rmtree(template / "out", ignore_errors=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "work", type=Path, help="folder for the sound files, the damaged ones that fail, and the summary"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first mutation")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    template = options.work / "sound"
    shutil.rmtree(template, ignore_errors=True)
    template.mkdir(parents=True)
    import_everything()
    write_in_child(template)
    tokens = next(path.name for path in (template / "set").iterdir() if path.suffix == ".safetensors")
    usual = baselines(options.work, template, tokens)
    failures = []
    for number in range(options.first, options.first + options.count):
        rng = random.Random(f"{options.seed}:{number}")
        kind = KINDS[number % len(KINDS)]
        folder = options.work / f"{options.seed}-{number}"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(template, folder)
        file = folder / kind.file.format(tokens=tokens)
        file.write_bytes(rng.choice(kind.mutators)(file.read_bytes(), rng))
        command = rng.choice(kind.commands)
        failure, seconds, memory = run(arguments(command, folder, file), folder / "log.txt", options.seconds)
        allowed = usual[kind.name, command] + max(_FLOOR, _TIMES_INPUT * file.stat().st_size)
        if not failure and memory > allowed:
            failure = f"{(memory - usual[kind.name, command]) / 1e6:.0f} MB more than for the sound file"
        if failure:
            said = (folder / "log.txt").read_text(errors="replace").strip().splitlines()[-1:]
            outcome = Outcome(number, kind.name, command, failure, "".join(said)[:300], round(seconds, 2), memory)
            failures.append(outcome)
            print(f"{number} {kind.name}: {failure}: {outcome.said}", flush=True)
        else:
            shutil.rmtree(folder)
    summary = {
        "seed": options.seed,
        "first": options.first,
        "count": options.count,
        "seconds": options.seconds,
        "failures": [asdict(one) for one in failures],
    }
    (options.work / "summary.json").write_text(json.dumps(summary, indent=2))
    print(f"{len(failures)} of {options.count} mutations failed")
    sys.exit(min(len(failures), 255))


if __name__ == "__main__":
    main()
