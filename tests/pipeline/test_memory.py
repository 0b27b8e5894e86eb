"""Runs with less memory than their hidden states need: files hold them, and the result is the same."""

import gc
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import calibrant as cb
from calibrant import checkpoint_interval
from calibrant.cli.main import app
from calibrant.engine.block_solver import BlockSolver
from calibrant.errors import CalibrantError
from calibrant.formats.safetensors_file import stored_tensors
from calibrant.modeling import entry
from calibrant.pipeline import memory, own_set
from calibrant.progress import NoProgress
from tests.conftest import ARCHITECTURES, random_set
from tests.pipeline.test_interrupted_runs import BLOCKS, RECIPES, _Killed, _KillsAfter, compressed, files, model, recipe

__all__ = ["model"]  # a fixture
CAUSAL = [name for name in ARCHITECTURES if not name.startswith("bert")]


@pytest.fixture(autouse=True)
def _several_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entry, "MICRO_BATCH_TOKENS", 64)
    monkeypatch.setattr(checkpoint_interval, "CHECKPOINT_SHARE", 0)


@pytest.mark.parametrize("name", RECIPES)
def test_less_memory_gives_the_same_bytes(model: Path, tmp_path: Path, name: str) -> None:
    compressed(model, tmp_path / "roomy", name, NoProgress(), memory="64GB")
    compressed(model, tmp_path / "tight", name, NoProgress(), memory="1MB")
    assert files(tmp_path / "tight") == files(tmp_path / "roomy")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["roomy", "tight"]


@pytest.mark.parametrize("order", ["two-pass", "independent"])
def test_in_every_order(model: Path, tmp_path: Path, order: str) -> None:
    compressed(model, tmp_path / "roomy", "keys and values", NoProgress(), memory="64GB", order=order)
    compressed(model, tmp_path / "tight", "keys and values", NoProgress(), memory="1MB", order=order)
    assert files(tmp_path / "tight") == files(tmp_path / "roomy")


@pytest.mark.parametrize("architecture", CAUSAL)
def test_in_every_architecture(model_folder: Callable[[str], Path], tmp_path: Path, architecture: str) -> None:
    folder = model_folder(architecture)
    said: dict[str, Any] = {"recipe": recipe("gptq"), "calibration": random_set(folder), "dtype": "float32"}
    cb.compress(folder, output=tmp_path / "roomy", memory="64GB", **said)
    cb.compress(folder, output=tmp_path / "tight", memory="1MB", **said)
    assert files(tmp_path / "tight") == files(tmp_path / "roomy")


@pytest.mark.parametrize("name", ["gptq", "drift", "awq"])
@pytest.mark.parametrize("later", ["1MB", "64GB"])
def test_a_broken_run_goes_on_where_its_states_are(model: Path, tmp_path: Path, name: str, later: str) -> None:
    compressed(model, tmp_path / "whole", name, NoProgress(), memory="64GB")
    with pytest.raises(_Killed):
        compressed(model, tmp_path / "parts", name, _KillsAfter(3), memory="1MB")
    copies = 2 if name == "drift" else 1
    # Of the four batches: what enters the block that the state is before, and the output of that block.
    assert len(list((tmp_path / "parts.journal" / "states-0").iterdir())) in (4 * copies, 8 * copies)
    assert (tmp_path / "parts.journal" / "blocks.safetensors").stat().st_size < 8 * 32 * 64 * 4
    last = _KillsAfter(99)
    compressed(model, tmp_path / "parts", name, last, memory=later)
    assert any(note.startswith(f"continues after block 3 of {BLOCKS}") for note in last.notes)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def _lost(states: Path) -> None:
    next(states.glob("*.hidden")).unlink()


def _shortened(states: Path) -> None:
    file = next(states.glob("*.hidden"))
    file.write_bytes(file.read_bytes()[:-4])


def _flipped(states: Path) -> None:
    file = next(states.glob("*.hidden"))
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [_lost, _shortened, _flipped])
def test_damaged_states_say_what_to_do(model: Path, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    with pytest.raises(_Killed):
        compressed(model, tmp_path / "out", "gptq", _KillsAfter(3), memory="1MB")
    damage(tmp_path / "out.journal" / "states-0")
    with pytest.raises(CalibrantError, match=r"hidden is missing or has changed.*delete .*out\.journal"):
        compressed(model, tmp_path / "out", "gptq", NoProgress(), memory="1MB")


def test_links_in_a_journal_are_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(_Killed):
        compressed(model, tmp_path / "out", "gptq", _KillsAfter(3), memory="1MB")
    states = tmp_path / "out.journal" / "states-0"
    states.rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "thesis.txt").write_text("mine")
    states.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CalibrantError, match=r"states-0: is a link, which no journal has"):
        compressed(model, tmp_path / "out", "gptq", NoProgress(), memory="1MB")
    assert (tmp_path / "elsewhere" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("size", ["6 GB extra", "much", "0", "-1GB", True, "nan", "9" * 500])
def test_sizes_that_are_none(llama: Path, tmp_path: Path, size: Any) -> None:
    with pytest.raises(CalibrantError, match="is no amount of memory; write it as 6GB or 512MB") as refused:
        cb.prepare(llama, output=tmp_path / "out", recipe="rtn-w8a16", memory=size)
    assert len(str(refused.value)) < 120


@pytest.mark.parametrize("architecture", ["gpt2", "bloom", "falcon"])
def test_models_of_other_spellings_write_their_sets(
    model_folder: Callable[[str], Path], tmp_path: Path, architecture: str
) -> None:
    folder = model_folder(architecture)
    cb.compress(folder, output=tmp_path / "out", recipe=recipe("gptq"), samples=2, length=8)
    assert cb.RunRecord.read(tmp_path / "out").calibration.strategy == "self"


def test_the_next_block_is_asked_for_while_one_is_solved(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda file, begin, size, advice: asked.append((begin, size)))
    compressed(model, tmp_path / "out", "rtn", NoProgress())
    places = stored_tensors(model / "model.safetensors")
    later = {name: one for name, one in places.items() if ".layers." in name and ".layers.0." not in name}
    assert sorted(asked) == sorted((one.begin, one.end - one.begin) for one in later.values())
    raw = (model / "model.safetensors").read_bytes()
    for name, tensor in load_file(model / "model.safetensors").items():
        assert raw[places[name].begin : places[name].end] == tensor.numpy().tobytes()


def test_the_command_says_where_hidden_states_will_be(model: Path, tmp_path: Path) -> None:
    random_set(model).save(tmp_path / "set")
    command = ["compress", str(model), "-o", str(tmp_path / "out"), "-c", str(tmp_path / "set"), "-r", "gptq-w4a16-g32"]
    tight = CliRunner().invoke(app, [*command, "--memory", "1MB", "--dry-run"])
    assert "of disk while it runs, where the hidden states are kept)" in " ".join(tight.output.split())
    assert "of memory are needed, 0.0 GB may be used" in " ".join(tight.output.split())
    alone = CliRunner().invoke(app, [*command[:4], "-r", "gptq-w4a16-g32", "--memory", "1MB", "--dry-run"])
    assert "the set is drawn from the built-in corpus" in " ".join(alone.output.split())
    roomy = CliRunner().invoke(app, [*command, "--dry-run"])
    assert "hidden states" not in roomy.output
    wrong = CliRunner().invoke(app, [*command, "--memory", "much"])
    assert "much: is no amount of memory; write it as 6GB or 512MB" in str(wrong.exception or wrong.output)


def test_a_run_that_needs_more_memory_says_so(model: Path, tmp_path: Path) -> None:
    seen = _KillsAfter(99)
    compressed(model, tmp_path / "out", "gptq", seen, memory="1MB")
    assert any("of memory are needed, 0.0 GB may be used" in note for note in seen.notes)


@pytest.mark.parametrize(("version", "controllers"), [(1, "memory"), (2, "")])
def test_limits_of_control_groups_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int, controllers: str
) -> None:
    root, limit, used = tmp_path / "mounted", "limit", "used"
    inner = root / "outer" / "inner"
    inner.mkdir(parents=True)
    for folder, most in ((root / "outer", "3000"), (inner, "max")):
        (folder / limit).write_text(most + "\n")
        (folder / used).write_text("1500\n")
        (folder / "memory.stat").write_text("inactive_file 400\nactive_file 100\nanon 1000\n")
    groups = tmp_path / "cgroup"
    groups.write_text(f"7:cpu:/elsewhere\n{version}:{controllers}:/outer/inner\n")
    monkeypatch.setattr(memory, "_GROUPS", groups)
    monkeypatch.setattr(memory, "_LIMITS", {controllers: (root, limit, used)})
    monkeypatch.setattr(memory, "resident_memory", lambda: 1000)
    assert memory.usable_memory(torch.device("cpu")) == 1000 + 3000 - 1500 + 500


class _Notes(NoProgress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_a_model_that_does_not_fit_hands_over_to_a_corpus(model: Path, tmp_path: Path) -> None:
    seen = _Notes()
    said: dict[str, Any] = {"recipe": recipe("gptq"), "samples": 4, "length": 16}
    cb.compress(model, output=tmp_path / "out", memory="1MB", progress=seen, **said)
    assert any("the set is drawn from the built-in corpus; give text of yours" in note for note in seen.notes)
    assert cb.RunRecord.read(tmp_path / "out").calibration.strategy == "uniform"
    cb.compress(model, output=tmp_path / "roomy", memory="64GB", **said)
    assert cb.RunRecord.read(tmp_path / "roomy").calibration.strategy == "self"


def test_rows_are_written_in_batches_that_fit(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_set, "resident_memory", lambda: 0)
    folder = cb.prepare(model, output=model.with_name("out"), recipe="rtn-w8a16").model.folder
    size, weights = own_set.SetSize(8, 16, 0, 0), own_set._model_bytes(folder, torch.float32)
    row = 16 * 2 * 2 * 16 * BLOCKS * 4  # tokens, keys and values, two heads of sixteen
    fits = {weights - 1: 0, weights + row: 1, weights + 5 * row: 4, weights + 1000 * row: 64}
    for most, rows in fits.items():
        assert own_set._fitting_rows(folder, size, torch.float32, most) == rows


def bytes_of_tensors() -> int:
    """Bytes of the storages of all tensors in this process."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = [one for one in gc.get_objects() if type(one) is torch.Tensor and not one.is_meta]
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
    return sum(storages.values())


@pytest.mark.parametrize(("name", "dtype"), [("gptq", "float32"), ("drift", "float32"), ("gptq", "bfloat16")])
def test_memory_of_suspended_passes_does_not_grow_with_the_rows(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, dtype: str
) -> None:
    """The most bytes of tensors while layers are solved: of 96 rows instead of 16, in files and in memory."""
    most = [0]
    solve = BlockSolver.solve

    def measured(self: BlockSolver, unit: Any) -> None:
        most[0] = max(most[0], bytes_of_tensors())
        solve(self, unit)

    monkeypatch.setattr(BlockSolver, "solve", measured)
    found = {}
    for most_memory in ("1MB", "64GB"):
        for rows in (16, 96):
            most[0] = 0
            cb.compress(
                model, output=tmp_path / f"{most_memory}-{rows}", recipe=recipe(name), memory=most_memory,
                calibration=random_set(model, samples=rows), dtype=dtype,
            )  # fmt: skip
            found[most_memory, rows] = most[0]
    states = 80 * 32 * 64 * (4 if dtype == "float32" else 2)  # of 80 rows
    assert found["64GB", 96] - found["64GB", 16] > 2 * states
    assert found["1MB", 96] - found["1MB", 16] < 0.2 * states


def test_the_peak_is_that_of_this_program_alone() -> None:
    """Not of the one that started it, as the system's account of children has it."""
    child = "from calibrant.pipeline.memory import peak_memory; print(peak_memory())"
    parent = "import subprocess, sys; held = bytearray(b'1') * 1_500_000_000; "
    parent += f"subprocess.run([sys.executable, '-c', {child!r}])"
    said = subprocess.run([sys.executable, "-c", parent], check=True, capture_output=True, text=True).stdout
    assert int(said) < 1_500_000_000
