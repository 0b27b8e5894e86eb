"""Runs that are killed, stopped or started twice: the same command ends with the bytes of an uninterrupted run."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import calibrant as cb
from calibrant import checkpoint_interval
from calibrant.calibration.sources import text_generation
from calibrant.cli.main import app
from calibrant.errors import CalibrantError
from calibrant.pipeline import own_set
from calibrant.progress import NoProgress
from calibrant.stopping import StoppedError, stopping_gently
from tests.conftest import random_set, write_tokenizer

BLOCKS = 6
RECIPES: dict[str, dict[str, Any]] = {
    "rtn": {"method": {"name": "rtn"}},
    "gptq": {"method": {"name": "gptq"}},
    "quantease": {"method": {"name": "quantease", "sweeps": 2}},
    "spqr": {
        "method": {"name": "spqr"},
        "scheme": {"weights": {"bits": 4, "group_size": 16, "symmetric": False}},
    },
    "adpq": {"method": {"name": "adpq"}},
    "hqq": {"method": {"name": "hqq"}, "scheme": {"weights": {"bits": 4, "group_size": 32, "symmetric": False}}},
    "sparsegpt": {"method": {"name": "sparsegpt"}, "scheme": {"sparsity": "2:4"}},
    "wanda": {"method": {"name": "wanda"}, "scheme": {"sparsity": "0.5"}},
    "magnitude": {"method": {"name": "magnitude"}, "scheme": {"sparsity": "0.5"}},
    "awq": {"method": {"name": "rtn"}, "transforms": [{"name": "awq", "steps": 3}]},
    "static activations": {
        "method": {"name": "gptq"},
        "scheme": {"weights": {"bits": 8}, "activations": {"dynamic": False}},
    },
    "keys and values": {"method": {"name": "rtn"}, "scheme": {"weights": {"bits": 4}, "kv_cache": {"type": "int8"}}},
    "drift": {"method": {"name": "gptq"}, "drift_correction": 0.5},
    "reconstruction": {"method": {"name": "gptq"}, "reconstruction": {"epochs": 2}},
    "reconstructed zeros": {
        "method": {"name": "sparsegpt", "refine_sweeps": 2},
        "scheme": {"sparsity": "2:4"},
        "drift_correction": 0.5,
        "reconstruction": {"epochs": 2},
    },
    "budget": {"method": {"name": "gptq"}, "budget": {"choices": [2, 4, 8], "average": 4}},
    "head": {"method": {"name": "rtn"}, "scheme": {"weights": {"bits": 4}, "lm_head": {}}},
}
_TWO_SSP = {"method": {"name": "2ssp"}, "scheme": {"sparsity": "0.25"}}


def recipe(name: str) -> cb.Recipe:
    said: dict[str, Any] = {"name": name, "description": "d", "scheme": {"weights": {"bits": 4, "group_size": 32}}}
    return cb.Recipe.model_validate({**said, **(_TWO_SSP if name == "2ssp" else RECIPES[name])})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers as hf

    folder = tmp_path_factory.mktemp("interrupted") / "model"
    config = hf.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=BLOCKS, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=100, initializer_range=0.2, pad_token_id=None, max_position_embeddings=64,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf.LlamaForCausalLM(config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(autouse=True)
def _saving_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_interval, "CHECKPOINT_SHARE", 0)


class _Killed(BaseException):
    pass


class _KillsAfter(NoProgress):
    """Ends the run when ``count`` steps of the task ``label`` are done, by default blocks."""

    def __init__(self, count: int, label: str = "compressing") -> None:
        self.left, self.label, self.notes = count, label, list[str]()

    @contextmanager
    def task(self, label: str, total: int | None, unit: str = "") -> Iterator[Any]:
        outer = self

        class Handle:
            def advance(self, steps: int = 1) -> None:
                if label == outer.label and steps == 1:
                    outer.left -= 1
                    if outer.left == 0:
                        raise _Killed

        yield Handle()

    def note(self, text: str) -> None:
        self.notes.append(text)


class _Steps(NoProgress):
    """Counts the steps of the task ``label`` that are done one by one."""

    def __init__(self, label: str) -> None:
        self.label, self.alone = label, 0

    @contextmanager
    def task(self, label: str, total: int | None, unit: str = "") -> Iterator[Any]:
        outer = self

        class Handle:
            def advance(self, steps: int = 1) -> None:
                outer.alone += label == outer.label and steps == 1

        yield Handle()


def files(folder: Path) -> dict[str, bytes]:
    """What has to be equal: everything but the report and the training's curves, which have times."""
    found = [path for path in folder.rglob("*") if path.is_file() and path.name != "report.json"]
    found = [path for path in found if "tfevents" not in path.name]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def compressed(model: Path, output: Path, name: str, progress: NoProgress, **options: Any) -> None:
    cb.compress(
        model, output=output, recipe=recipe(name), calibration=random_set(model), progress=progress, dtype="float32",
        **options,
    )  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_a_broken_run_goes_on_to_the_same_bytes(model: Path, tmp_path: Path, name: str) -> None:
    compressed(model, tmp_path / "whole", name, NoProgress())
    for count in (2, 3):
        with pytest.raises(_Killed):
            compressed(model, tmp_path / "parts", name, _KillsAfter(count))
        assert not (tmp_path / "parts").exists()
    last = _KillsAfter(99)
    compressed(model, tmp_path / "parts", name, last)
    assert any(note.startswith(f"continues after block 5 of {BLOCKS}") for note in last.notes)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "whole"]


@pytest.mark.parametrize(
    ("said", "label", "count", "saved"),
    [
        ({"method": {"name": "qat", "steps": 4}}, "compressing", 3, "block 3 of 6"),
        ({"method": {"name": "gptq"}, "distillation": {}}, "compressing", 3, "block 3 of 6"),
        ({"method": {"name": "gptq"}, "distillation": {}}, "original", 3, "block 6 of 6"),
    ],
    ids=["after a training", "before a distillation", "in a distillation"],
)
def test_blocks_beside_a_training_of_the_whole_model(
    model: Path, tmp_path: Path, said: dict[str, Any], label: str, count: int, saved: str
) -> None:
    scheme = {"weights": {"bits": 4, "group_size": 32}}
    chosen = cb.Recipe.model_validate({"name": "r", "description": "d", "scheme": scheme, **said})
    options: dict[str, Any] = {"recipe": chosen, "dtype": "float32", "calibration": random_set(model)}
    cb.compress(model, output=tmp_path / "whole", **options)
    with pytest.raises(_Killed):
        cb.compress(model, output=tmp_path / "parts", progress=_KillsAfter(count, label), **options)
    assert cb.status(tmp_path / "parts").done == saved
    cb.compress(model, output=tmp_path / "parts", **options)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


@pytest.mark.parametrize(
    ("name", "label", "count", "saved"),
    [
        ("budget", "measuring sensitivity", 4, "the sensitivity of block 4 of 6"),
        ("2ssp", "measuring neurons", 4, "the neurons of block 4 of 6"),
        ("2ssp", "removing attention", 3, "a part of the search for attention modules"),
        ("2ssp", "removing attention", 8, "a part of the search for attention modules"),
    ],
)
def test_what_is_measured_first_goes_on_too(
    model: Path, tmp_path: Path, name: str, label: str, count: int, saved: str
) -> None:
    compressed(model, tmp_path / "whole", name, NoProgress())
    with pytest.raises(_Killed):
        compressed(model, tmp_path / "parts", name, _KillsAfter(count, label))
    assert cb.status(tmp_path / "parts").done == saved
    steps = _Steps(label)
    compressed(model, tmp_path / "parts", name, steps)
    # Rounds of the search that had ended, each of six steps, are not done again.
    assert steps.alone == {4: 2, 3: 12, 8: 6}[count]
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "whole"]


@pytest.mark.parametrize("order", ["two-pass", "independent"])
def test_the_other_orders_go_on_too(model: Path, tmp_path: Path, order: str) -> None:
    compressed(model, tmp_path / "whole", "gptq", NoProgress(), order=order)
    with pytest.raises(_Killed):
        compressed(model, tmp_path / "parts", "gptq", _KillsAfter(3), order=order)
    compressed(model, tmp_path / "parts", "gptq", NoProgress(), order=order)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_values_that_blocks_hand_on_are_kept(tmp_path: Path) -> None:
    import transformers as hf

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = hf.RwkvConfig(vocab_size=100, hidden_size=32, attention_hidden_size=32, num_hidden_layers=4)
        hf.RwkvForCausalLM(config).save_pretrained(tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    compressed(tmp_path / "model", tmp_path / "whole", "gptq", NoProgress())
    with pytest.raises(_Killed):
        compressed(tmp_path / "model", tmp_path / "parts", "gptq", _KillsAfter(2))
    compressed(tmp_path / "model", tmp_path / "parts", "gptq", NoProgress())
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_the_status_says_where_a_run_is(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert cb.status(output).state == "nothing"
    with pytest.raises(_Killed):
        compressed(model, output, "gptq", _KillsAfter(4))
    found = cb.status(output)
    assert (found.state, found.recipe, found.done) == ("interrupted", "gptq", f"block 4 of {BLOCKS}")
    shown = CliRunner().invoke(app, ["status", str(output)]).stdout
    assert f"interrupted, gptq; saved: block 4 of {BLOCKS}" in shown
    assert "the same command continues from there" in shown
    compressed(model, output, "gptq", NoProgress())
    assert json.loads(CliRunner().invoke(app, ["status", str(output), "--json"]).stdout)["state"] == "finished"


def test_other_runs_are_refused_by_the_first_difference(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(_Killed):
        compressed(model, output, "gptq", _KillsAfter(2))
    with pytest.raises(CalibrantError, match=r"recipe\.description is .* there and"):
        cb.compress(model, output=output, recipe="gptq-w4a16", calibration=random_set(model))
    with pytest.raises(CalibrantError, match=r"settings\.compute_dtype is \"float32\" there and \"bfloat16\" here"):
        cb.compress(model, output=output, recipe=recipe("gptq"), calibration=random_set(model), dtype="bfloat16")
    other = random_set(model, seed=1)
    with pytest.raises(CalibrantError, match=r"calibration\.sha256 is"):
        cb.compress(model, output=output, recipe=recipe("gptq"), calibration=other, dtype="float32")
    cb.compress(model, output=output, recipe="rtn-w8a8", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("share", [0, 1e9])
def test_a_set_that_the_model_wrote_is_kept(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    """With a state of the blocks, and without one."""
    monkeypatch.setattr(checkpoint_interval, "CHECKPOINT_SHARE", share)
    options: dict[str, Any] = {"recipe": recipe("gptq"), "samples": 4, "length": 16, "dtype": "float32"}
    cb.compress(model, output=tmp_path / "whole", **options)
    with pytest.raises(_Killed):
        cb.compress(model, output=tmp_path / "parts", progress=_KillsAfter(2), **options)
    assert cb.status(tmp_path / "parts").done == ("the calibration set" if share else f"block 2 of {BLOCKS}")
    monkeypatch.setattr("calibrant.pipeline.own_set.generate_self_calibration", None)  # not called again
    cb.compress(model, output=tmp_path / "parts", **options)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "whole"]


@pytest.mark.parametrize("signal_after", [None, 2])
def test_rows_that_the_model_wrote_are_kept(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signal_after: int | None
) -> None:
    """Killed within the third batch of rows, or asked to stop within the second."""
    monkeypatch.setattr(own_set, "BATCH_SIZE", 2)
    options: dict[str, Any] = {"recipe": recipe("gptq"), "samples": 8, "length": 16, "dtype": "float32"}
    cb.compress(model, output=tmp_path / "whole", **options)
    write, written = text_generation._Batch.write, list[int]()

    def counted(batch: Any, column: int, decoder: Any) -> None:
        if column == 1:
            written.append(batch.first_row)
        if column == 5 and signal_after is None and len(written) == 3:
            raise _Killed
        if column == 5 and len(written) == signal_after:
            os.kill(os.getpid(), signal.SIGINT)
        write(batch, column, decoder)

    monkeypatch.setattr(text_generation._Batch, "write", counted)
    with pytest.raises((_Killed, StoppedError)) as ended, stopping_gently(lambda text: None):
        cb.compress(model, output=tmp_path / "parts", **options)
    assert signal_after is None or "stopped after 4 rows of the calibration set" in str(ended.value)
    assert cb.status(tmp_path / "parts").done == "a part of the calibration set"
    begun = len(written)
    cb.compress(model, output=tmp_path / "parts", **options)
    assert written[begun:] == [4, 6]
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "whole"]


def _truncate(journal: Path) -> None:
    file = journal / "blocks.safetensors"
    file.write_bytes(file.read_bytes()[:200])


def _empty(journal: Path) -> None:
    (journal / "parts" / "part-00001.safetensors").write_bytes(b"")


def _lose(journal: Path) -> None:
    (journal / "parts" / "part-00000.safetensors").unlink()


def _cut(journal: Path) -> None:
    part = journal / "parts" / "part-00001.safetensors"
    part.write_bytes(part.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [_truncate, _empty, _lose, _cut])
def test_a_damaged_journal_says_what_to_do(model: Path, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    with pytest.raises(_Killed):
        compressed(model, tmp_path / "out", "gptq", _KillsAfter(3))
    damage(tmp_path / "out.journal")
    with pytest.raises(CalibrantError, match=r"damaged .* delete .*out\.journal to begin the run anew"):
        compressed(model, tmp_path / "out", "gptq", NoProgress())
    assert not (tmp_path / "out").exists()


def test_a_changed_part_is_never_published(model: Path, tmp_path: Path) -> None:
    with pytest.raises(_Killed):
        compressed(model, tmp_path / "out", "gptq", _KillsAfter(3))
    part = tmp_path / "out.journal" / "parts" / "part-00001.safetensors"
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    with pytest.raises(CalibrantError, match=r"damaged \(part-00001.safetensors: tensor .* has changed\); delete"):
        compressed(model, tmp_path / "out", "gptq", NoProgress())
    assert not (tmp_path / "out").exists()


def test_a_changed_state_is_never_taken_up(model: Path, tmp_path: Path) -> None:
    with pytest.raises(_Killed):
        compressed(model, tmp_path / "out", "gptq", _KillsAfter(3))
    state = tmp_path / "out.journal" / "blocks.safetensors"
    content = state.read_bytes()
    place = content.index(b"relative_error") + content[content.index(b"relative_error") :].index(b"0.00")
    state.write_bytes(content[:place] + b"0.99" + content[place + 4 :])
    with pytest.raises(CalibrantError, match=r"blocks\.safetensors: damaged \(does not have its hash\)"):
        compressed(model, tmp_path / "out", "gptq", NoProgress())


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[4])
from pathlib import Path
from calibrant import checkpoint_interval
from calibrant.cli.main import main
checkpoint_interval.CHECKPOINT_SHARE = 0
import calibrant.engine.compress_blocks as blocks
import time
solve = blocks._Compression.compress
def slow(self, index):
    time.sleep(0.3)
    return solve(self, index)
blocks._Compression.compress = slow
model, output, calibration = sys.argv[1:4]
sys.argv = f"calibrant compress {model} -o {output} -c {calibration} -r gptq-w4a16 --dtype float32".split()
main()
"""


def started(model: Path, output: Path, calibration: Path) -> subprocess.Popen[str]:
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", SCRIPT, str(model), str(output), str(calibration), root]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def wait_for(ready: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not ready() and process.poll() is None:
        time.sleep(0.02)
    assert process.poll() is None


@pytest.fixture
def calibration(model: Path, tmp_path: Path) -> Path:
    random_set(model).save(tmp_path / "set")
    return tmp_path / "set"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_block(model: Path, tmp_path: Path, calibration: Path, number: signal.Signals) -> None:
    cb.compress(model, output=tmp_path / "whole", recipe="gptq-w4a16", calibration=calibration, dtype="float32")
    process = started(model, tmp_path / "out", calibration)
    wait_for((tmp_path / "out.journal" / "blocks.safetensors").is_file, process)
    process.send_signal(number)
    _, said = process.communicate()
    assert process.returncode == 130
    assert "stopping where the run can continue later" in said
    assert "the same command continues from there" in said
    assert cb.status(tmp_path / "out").state == "interrupted"
    assert started(model, tmp_path / "out", calibration).wait() == 0
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_two_runs_do_not_write_to_one_output_and_a_kill_leaves_what_goes_on(
    model: Path, tmp_path: Path, calibration: Path
) -> None:
    output = tmp_path / "out"
    cb.compress(model, output=tmp_path / "whole", recipe="gptq-w4a16", calibration=calibration, dtype="float32")
    first = started(model, output, calibration)
    wait_for((tmp_path / "out.journal" / "blocks.safetensors").is_file, first)
    assert cb.status(output).state == "running"
    with pytest.raises(CalibrantError, match="another run writes there now"):
        cb.compress(model, output=output, recipe="gptq-w4a16", calibration=calibration, dtype="float32")
    first.kill()
    first.communicate()
    assert cb.status(output).state == "interrupted"
    cb.compress(model, output=output, recipe="gptq-w4a16", calibration=calibration, dtype="float32")
    assert files(output) == files(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "set", "whole"]


def test_a_disk_that_is_too_small_is_seen_first(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10_000))
    with pytest.raises(CalibrantError, match=r"needs about 0\.\d MB of disk, 0\.0 MB are free"):
        cb.prepare(model, output=tmp_path / "out", recipe=recipe("gptq"), calibration=random_set(model))
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_leaves_what_goes_on(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every write of a file in turn."""
    compressed(model, tmp_path / "whole", "gptq", NoProgress())
    writes = [0]

    def failing(fails_at: int) -> Callable[..., None]:
        def save(*args: Any, **kwargs: Any) -> None:
            writes[0] += 1
            if writes[0] == fails_at:
                raise OSError(errno.ENOSPC, "No space left on device")
            save_file(*args, **kwargs)

        return save

    for number in range(1, 100):
        writes[0] = 0
        save = failing(number)
        monkeypatch.setattr("calibrant.formats.shards.save_file", save)
        monkeypatch.setattr("calibrant.journal.save_file", save)
        try:
            compressed(model, tmp_path / "parts", "gptq", NoProgress())
        except CalibrantError as error:
            assert "no space left on the disk" in str(error)  # noqa: PT017
        else:
            break
    assert number > 4
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


@pytest.mark.parametrize(
    ("method", "transforms", "saved"),
    [
        ({"name": "qat", "steps": 8}, [], "step 1 of the training"),
        ({"name": "rtn"}, [{"name": "quadapter", "steps": 2}], "the scales of block 1"),
        ({"name": "gptq"}, [], "8 rows of the calibration set"),
    ],
)
def test_what_comes_before_the_blocks_stops_too(
    model: Path, tmp_path: Path, method: dict[str, Any], transforms: list[dict[str, Any]], saved: str
) -> None:
    """Where its state is saved; the run that is given again ends with the same bytes."""
    scheme = {"weights": {"bits": 4, "group_size": 32}}
    chosen = cb.Recipe.model_validate(
        {"name": "r", "description": "d", "method": method, "transforms": transforms, "scheme": scheme}
    )
    own = saved == "8 rows of the calibration set"
    made = {"samples": 8, "length": 16} if own else {"calibration": random_set(model, length=64)}
    options: dict[str, Any] = {"recipe": chosen, "dtype": "float32", **made}
    cb.compress(model, output=tmp_path / "whole", **options)
    told: list[str] = []

    def stopped() -> None:
        with stopping_gently(told.append):
            os.kill(os.getpid(), signal.SIGINT)
            cb.compress(model, output=tmp_path / "parts", **options)

    with pytest.raises(StoppedError, match=f"stopped after {saved}: the same command"):
        stopped()
    assert len(told) == 1
    assert not (tmp_path / "parts").exists()
    cb.compress(model, output=tmp_path / "parts", **options)
    # TensorBoard's files have times.
    ours, theirs = (
        {name: one for name, one in files(tmp_path / part).items() if not name.startswith("training/")}
        for part in ("parts", "whole")
    )
    assert ours == theirs


def test_a_folder_of_others_is_never_taken_for_a_journal(model: Path, tmp_path: Path) -> None:
    own = tmp_path / "out.journal"
    (own / "sub").mkdir(parents=True)
    for name in ("run.json", "diary.txt", "sub/x"):
        (own / name).write_text("{}")
    with pytest.raises(CalibrantError, match=r"out\.journal: is in the way of the run's journal, and holds"):
        compressed(model, tmp_path / "out", "rtn", NoProgress(), overwrite=True)
    assert sorted(path.name for path in own.rglob("*")) == ["diary.txt", "run.json", "sub", "x"]
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "run.json").write_text("{}")
    (tmp_path / "other.journal").symlink_to(tmp_path / "victim")
    with pytest.raises(CalibrantError, match=r"other\.journal: is in the way"):
        compressed(model, tmp_path / "other", "rtn", NoProgress(), overwrite=True)
    assert (tmp_path / "victim" / "run.json").is_file()


def test_work_is_kept_if_the_output_is_taken_during_the_run(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    compressed(model, tmp_path / "whole", "gptq", NoProgress())

    class _Takes(NoProgress):
        @contextmanager
        def task(self, label: str, total: int | None, unit: str = "") -> Iterator[Any]:
            output.mkdir(exist_ok=True)
            (output / "notes.txt").write_text("mine")
            with super().task(label, total) as task:
                yield task

    with pytest.raises(CalibrantError, match=r"exists and is not empty.* It appeared during the run: move it, and run"):
        compressed(model, output, "gptq", _Takes())
    assert (output / "notes.txt").read_text() == "mine"
    shutil.rmtree(output)
    last = _KillsAfter(99)
    compressed(model, output, "gptq", last)
    assert any("continues after block" in note for note in last.notes)
    assert files(output) == files(tmp_path / "whole")
