"""Two processes that torchrun starts compress one model: what one process gives, to rounding."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import calibrant as cb
from calibrant.errors import CalibrantError
from calibrant.modeling.checkpoint import ModelFolder
from calibrant.modeling.find_blocks import find_blocks
from calibrant.modeling.lazy_model import LazyModel
from calibrant.ranks import Ranks
from tests.conftest import random_set
from tests.pipeline.test_interrupted_runs import RECIPES, files, model

__all__ = ["model"]  # a fixture
ROOT = Path(__file__).parents[2]
NAMES = [*RECIPES, "starved experts"]
# Here what became of a layer decides the targets of the next ones too, so that only errors are comparable.
FOLLOWING = ("drift", "reconstruction", "reconstructed zeros")

SCRIPT = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
import calibrant as cb
from calibrant import checkpoint_interval
from calibrant.engine import block_transforms
from calibrant.errors import CalibrantError
from calibrant.modeling import entry
from tests.conftest import random_set
from tests.pipeline.test_interrupted_runs import recipe
entry.MICRO_BATCH_TOKENS = 64
block_transforms._SEARCH_TOKENS = 64  # which the first of two ranks has
checkpoint_interval.CHECKPOINT_SHARE = 0
folder, job = Path(sys.argv[2]), json.loads(sys.argv[3])
for name, source, memory in job:
    chosen = recipe("gptq" if name == "starved experts" else name)
    if name == "starved experts":
        experts = {"starved": "all-tokens", "least_tokens": 80}
        chosen = cb.Recipe.model_validate({**chosen.model_dump(), "experts": experts})
    try:
        report = cb.compress(
            source, output=folder / name.replace(" ", "-"), recipe=chosen, calibration=random_set(Path(source)),
            dtype="float32", memory=memory,
        )
    except CalibrantError as error:
        print(f"{name}: {error}", flush=True)
"""


def decoded(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of an output's blocks as numbers."""
    config = json.loads((folder / "config.json").read_text())
    lazy = LazyModel(
        ModelFolder(folder, dequantize="quantization_config" in config), torch.float32, torch.device("cpu")
    )
    found = {}
    for name in find_blocks(lazy.module):
        with lazy.loaded(name) as module:
            found |= {f"{name}.{key}": value.clone() for key, value in module.state_dict().items()}
    return found


def run(folder: Path, job: list[tuple[str, Path, str]], ranks: int) -> str:
    """Run the script in so many processes; returns what they print."""
    folder.mkdir()
    script = folder.parent / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    said = json.dumps([(name, str(source), memory) for name, source, memory in job])
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [*start, str(script), str(ROOT), str(folder), said],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


@pytest.fixture(scope="module")
def outputs(
    model: Path, model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Path], str]:
    """Outputs of one process, of two, and of two again."""
    folder = tmp_path_factory.mktemp("ranks")
    job = [(name, model_folder("mixtral") if "experts" in name else model, "64GB") for name in NAMES]
    found = {name: folder / name for name in ("one", "two", "again", "tight")}
    run(found["one"], job, 1)
    said = run(found["two"], job, 2)
    some = [one for one in job if one[0] in ("gptq", "awq", "drift", "reconstruction", "starved experts")]
    run(found["again"], some, 2)
    run(found["tight"], [(name, source, "1MB") for name, source, _ in some], 2)
    return found, said


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("rtn", "magnitude", "hqq", "adpq", "head")])
def test_two_processes_agree_with_one_to_rounding(outputs: tuple[dict[str, Path], str], name: str) -> None:
    one, two = (outputs[0][which] / name.replace(" ", "-") for which in ("one", "two"))
    first, second = decoded(one), decoded(two)
    assert first.keys() == second.keys()
    for key, value in first.items():
        # A number halfway between two codes may become either, and layers see what became of the ones before them.
        if ".layers.0." in key and name not in FOLLOWING:
            assert (value - second[key]).norm() <= 0.05 * value.norm(), key
    reports = [cb.RunReport.read(folder) for folder in (one, two)]
    for left, right in zip(*(report.layers for report in reports), strict=True):
        assert (left.name, left.tokens, left.routed) == (right.name, right.tokens, right.routed)
        share = 0.1 if name in FOLLOWING else 0.05
        assert abs(left.relative_error - right.relative_error) < share * left.relative_error + 1e-9
    assert reports[0].rank_seconds == []
    assert len(reports[1].rank_seconds) == 2
    assert all(seconds["forward"] > 0 for seconds in reports[1].rank_seconds)


@pytest.mark.parametrize("name", ["gptq", "awq", "drift", "reconstruction", "starved experts"])
@pytest.mark.parametrize("other", ["again", "tight"])
def test_two_runs_of_two_processes_give_the_same_bytes(
    outputs: tuple[dict[str, Path], str], name: str, other: str
) -> None:
    folder = name.replace(" ", "-")
    assert files(outputs[0]["two"] / folder) == files(outputs[0][other] / folder)


def test_runs_without_rows_to_share_are_refused(outputs: tuple[dict[str, Path], str]) -> None:
    said = outputs[1]
    assert said.count("rtn: has no rows of a calibration set to share out") == 2
    assert not (outputs[0]["two"] / "rtn").exists()


def test_too_few_rows_are_refused_before_the_set_is_written(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ranks, "joined", lambda: Ranks(0, 3))
    monkeypatch.setattr("calibrant.pipeline.own_set.generate_self_calibration", None)
    with pytest.raises(CalibrantError, match=r"3 ranks for 2 batches of 2048 tokens .*; start fewer"):
        cb.compress(llama, output=tmp_path / "out", recipe="gptq-w4a16-g32", samples=65, length=32)
    assert not list(tmp_path.iterdir())


def test_a_stopped_run_of_two_goes_on(model: Path, tmp_path: Path, outputs: tuple[dict[str, Path], str]) -> None:
    random_set(model).save(tmp_path / "set")
    script = tmp_path / "slow.py"
    script.write_text(
        "import sys, time\n"
        "from calibrant.cli.main import main\n"
        "from calibrant import checkpoint_interval\n"
        "from calibrant.engine import compress_blocks\n"
        "from calibrant.modeling import entry\n"
        "entry.MICRO_BATCH_TOKENS, checkpoint_interval.CHECKPOINT_SHARE = 64, 0\n"
        "solve = compress_blocks._Compression.compress\n"
        "pause = [float(sys.argv.pop())]\n"
        "compress_blocks._Compression.compress = lambda self, index: (time.sleep(pause[0]), solve(self, index))[1]\n"
        "main()\n",
        encoding="utf-8",
    )
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    command = ["compress", str(model), "-c", str(tmp_path / "set"), "-r", "gptq-w4a16-g32", "--dtype", "float32"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}", "OMP_NUM_THREADS": "1"}
    whole = subprocess.run([*start, *command, "-o", str(tmp_path / "whole"), "0"], env=environment, check=False)
    assert whole.returncode == 0
    running = subprocess.Popen([*start, *command, "-o", str(tmp_path / "parts"), "1"], env=environment)
    state = tmp_path / "parts.journal" / "blocks.safetensors"
    end = time.monotonic() + 120
    while not state.is_file() and time.monotonic() < end:
        time.sleep(0.1)
    running.send_signal(signal.SIGTERM)
    assert running.wait(180) != 0
    assert not (tmp_path / "parts").exists()
    last = [*start, *command, "-o", str(tmp_path / "parts"), "0"]
    again = subprocess.run(last, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 0
    assert "continues after block" in again.stderr
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


@pytest.mark.parametrize(("count", "multiple", "size"), [(10, 1, 3), (100, 32, 3), (5, 32, 2), (0, 1, 2)])
def test_parts_cover_everything_once(count: int, multiple: int, size: int) -> None:
    parts = [Ranks(rank, size).part(count, multiple) for rank in range(size)]
    covered = [item for part in parts for item in range(part.start, part.stop)]
    assert covered == list(range(count))
    assert all(part.start % multiple == 0 for part in parts if part.start < count)
    assert torch.equal(torch.arange(count)[Ranks().part(count)], torch.arange(count))
