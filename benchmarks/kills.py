"""Does a run that is killed at any moment end with the bytes of one that was not?

    python benchmarks/kills.py WORK [--kills 50] [--only gptq "2ssp"]

For every method a tiny Llama is compressed by a process that is killed (SIGKILL) at random moments of the run, and
started again each time, until so many kills are done; whenever a run ends, its output is compared with that of a run
that nothing disturbed, and the next one begins anew. Processes are forks of one that has imported everything. States
are saved after every block. The result is written to ``results/kills.json``.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
import transformers as hf
from rich.console import Console
from rich.table import Table
from tests.conftest import random_set, write_tokenizer
from tests.pipeline.test_interrupted_runs import RECIPES
from tests.pipeline.test_interrupted_runs import files as all_files

import calibrant as cb
from calibrant import checkpoint_interval
from calibrant.training import training_loop
from fuzz import import_everything

RESULT = Path(__file__).parent / "results" / "kills.json"
_BLOCKS = 5
_SCHEME = {"weights": {"bits": 4, "group_size": 32}}
_TRAINING = {"steps": 12, "batch_size": 4, "length": 16}
_OTHERS: dict[str, dict[str, Any]] = {
    "2ssp": {"method": {"name": "2ssp"}, "scheme": {"sparsity": "0.25"}},
    "smoothquant": {
        "method": {"name": "rtn"},
        "transforms": [{"name": "smoothquant"}],
        "scheme": {"weights": {"bits": 8}, "activations": {"dynamic": True}},
    },
    "quadapter": {
        "method": {"name": "rtn"},
        "transforms": [{"name": "quadapter", "steps": 4}],
        "scheme": {"weights": {"bits": 8}, "activations": {"dynamic": False}},
    },
    "qat": {
        "method": {"name": "qat", **_TRAINING},
        "scheme": {"weights": {"bits": 4}, "activations": {"dynamic": False}},
    },
    "a set that the model writes": {"method": {"name": "gptq"}},
    "hidden states on the disk": {"method": {"name": "gptq"}},
}


def recipe(name: str) -> cb.Recipe:
    """The recipe of one of the names in the table."""
    known = {**RECIPES, **_OTHERS}
    return cb.Recipe.model_validate({"name": "r", "description": "d", "scheme": _SCHEME, **known[name]})


def files(folder: Path) -> dict[str, bytes]:
    """What has to be equal: not the curves of trainings, whose files have times."""
    return {name: content for name, content in all_files(folder).items() if "tfevents" not in name}


def write_model(folder: Path) -> None:
    config = hf.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=_BLOCKS, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=100, initializer_range=0.2, pad_token_id=None, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    hf.LlamaForCausalLM(config).save_pretrained(folder)
    write_tokenizer(folder)


def started(work: Path, name: str, output: Path) -> int:
    """A process that runs the recipe ``name``."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        with (work / "log.txt").open("a") as log:
            os.dup2(log.fileno(), 2)
        own = name == "a set that the model writes"
        cb.compress(
            work / "model", output=output, recipe=recipe(name), calibration=None if own else work / "set", samples=6,
            length=16, dtype="float32", memory="1MB" if name == "hidden states on the disk" else "64GB",
        )  # fmt: skip
        status = 0
    except BaseException as error:
        print(name, repr(error), file=sys.stderr, flush=True)
    finally:
        os._exit(status)


def ended(child: int, seconds: float) -> int | None:
    """The child's status when it ends within so many seconds, else None."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None


def of_method(work: Path, name: str, kills: int) -> dict[str, Any]:
    """Kills, runs that ended, and how many of them had other bytes."""
    rng = random.Random(name)
    whole, output = work / "whole", work / "out"
    for folder in (whole, output):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(folder.with_name(f"{folder.name}.journal"), ignore_errors=True)
    begin = time.monotonic()
    if ended(started(work, name, whole), 600):
        raise SystemExit(f"{name}: {(work / 'log.txt').read_text()[-2000:]}")
    seconds = time.monotonic() - begin
    wanted = files(whole)
    done = finished = different = failed = 0
    fresh = True
    while True:
        last = done == kills  # undisturbed
        begin = time.monotonic()
        child = started(work, name, output)
        status = ended(child, 600 if last else rng.uniform(0, seconds))
        if fresh and status == 0:  # other work may have slowed down the first run
            seconds = min(seconds, time.monotonic() - begin)
        fresh = output.exists()
        if status is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            done += 1
        failed += bool(status)
        if output.exists():
            finished += 1
            different += files(output) != wanted
            shutil.rmtree(output)
            shutil.rmtree(output.with_name("out.journal"), ignore_errors=True)
        if last or status:
            break
    left = [path.name for path in work.iterdir() if path.name.endswith(".partial")]
    return {
        "method": name,
        "seconds": round(seconds, 2),
        "kills": done,
        "finished": finished,
        "other_bytes": different,
        "failed": failed,
        "partial_folders_left": len(left),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder to work in, which must not exist")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--only", nargs="*", help="these methods alone")
    options = parser.parse_args()
    work = options.work.absolute()
    work.mkdir(parents=True)
    checkpoint_interval.CHECKPOINT_SHARE = 0
    training_loop.JOURNAL_SECONDS = training_loop.JOURNAL_SHARE = 0
    torch.set_num_threads(1)
    import_everything()
    child = os.fork()
    if not child:  # this process must not compute: its threads do not survive a fork
        write_model(work / "model")
        random_set(work / "model", samples=6, length=16).save(work / "set")
        os._exit(0)
    os.waitpid(child, 0)
    table = Table("method", "seconds", "kills", "runs that ended", "with other bytes", "failed")
    found = []
    for name in options.only or [*RECIPES, *_OTHERS]:
        one = of_method(work, name, options.kills)
        found.append(one)
        print(json.dumps(one), flush=True)
        keys = ("method", "seconds", "kills", "finished", "other_bytes", "failed")
        table.add_row(*(str(one[key]) for key in keys))
    Console().print(table)
    if options.only is None:
        result = {"date": datetime.now(UTC).date().isoformat(), "blocks": _BLOCKS, "methods": found}
        RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    sys.exit(sum(one["other_bytes"] + one["failed"] for one in found))


if __name__ == "__main__":
    main()
