"""Where outputs go: folders that cannot be replaced, places that cannot be written, what killed runs left."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import calibrant as cb
from calibrant import output_folder
from calibrant.errors import CalibrantError
from calibrant.output_folder import check_output, companion, staged, whole_file
from tests.abandoned import abandon
from tests.conftest import random_set


def _as_mount(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == folder)


def _as_bind_mount(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = folder.parent.parent / f"{folder.parent.name}.mountinfo"
    listed.write_text("1 0 8:1 / / rw - ext4 /dev/sda rw\n2 1 8:1 /a " + str(folder).replace(" ", "\\040") + " rw\n")
    monkeypatch.setattr(output_folder, "_MOUNTS", listed)


def _as_working_directory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def _in_a_parent_that_is_read_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder.parent and allowed(path, mode))


def _in_a_sticky_folder_of_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.parent.chmod(0o1777)
    monkeypatch.setattr(os, "geteuid", lambda: 54321)


STAYS = [
    _as_mount,
    _as_bind_mount,
    _as_working_directory,
    _in_a_parent_that_is_read_only,
    _in_a_sticky_folder_of_others,
]


@pytest.fixture(params=STAYS, ids=lambda make: make.__name__.strip("_"))
def staying(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that no other can replace."""
    folder = tmp_path / "a volume"
    folder.mkdir()
    (folder / "lost+found").mkdir()
    request.param(folder, monkeypatch)
    return folder


def _write(target: Path, text: str, overwrite: bool = False) -> None:
    with staged(check_output(target, overwrite), overwrite) as folder:
        for name in ("calibrant.json", "model.safetensors", "part/of.json"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(_content(text))


def _content(text: str) -> str:
    return f'{{"calibrant_version": "{text}"}}'


def _tree(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def _expected(text: str) -> dict[str, str]:
    return dict.fromkeys(("calibrant.json", "model.safetensors", "part/of.json"), _content(text))


def test_a_folder_that_stays_is_filled(staying: Path) -> None:
    same = staying.stat().st_ino
    _write(staying, "first")
    assert _tree(staying) == _expected("first")
    assert [path.name for path in staying.parent.iterdir()] == [staying.name]
    with pytest.raises(CalibrantError, match="`overwrite=True` replaces it"):
        check_output(staying, overwrite=False)
    (staying / "of an earlier version.json").write_text("")
    _write(staying, "second", overwrite=True)
    assert _tree(staying) == _expected("second")
    assert (staying.stat().st_ino, (staying / "lost+found").is_dir()) == (same, True)


def test_files_are_staged_in_a_folder_that_stays(staying: Path) -> None:
    with staged(staying) as folder:
        assert folder.is_relative_to(staying)
        assert check_output(staying, overwrite=False) == staying  # what is unfinished is no content


@pytest.mark.parametrize("name", [".", "./", "../inside", "../inside/.", "missing/.."])
def test_the_working_directory_by_its_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    here = tmp_path / "inside"
    here.mkdir()
    monkeypatch.chdir(here)
    _write(Path(name), "text")
    assert _tree(tmp_path) == {f"inside/{file}": text for file, text in _expected("text").items()}


def test_a_failed_run_leaves_a_folder_that_stays_as_it_was(staying: Path) -> None:
    def fails(error: BaseException) -> None:
        with staged(staying, overwrite=True) as folder:
            (folder / "calibrant.json").write_text("half")
            raise error

    _write(staying, "first")
    for error in (OSError("disk"), KeyboardInterrupt(), CalibrantError("values are not finite")):
        with pytest.raises((CalibrantError, KeyboardInterrupt)):
            fails(error)
        assert _tree(staying) == _expected("first")


@pytest.mark.parametrize("moves", range(6))
def test_a_move_that_fails_is_taken_back(staying: Path, monkeypatch: pytest.MonkeyPatch, moves: int) -> None:
    _write(staying, "first")
    done: list[Path] = []
    real = shutil.move

    def move(source: Path, target: Path) -> None:
        if len(done) == moves:
            done.append(target)
            raise OSError("stale file handle")
        real(source, target)
        done.append(target)
        # What looks complete is complete.
        seen = {name: text for name, text in _tree(staying).items() if name[0] != "."}
        assert "calibrant.json" not in seen or seen in (_expected("first"), _expected("second"))

    monkeypatch.setattr(shutil, "move", move)
    with pytest.raises(CalibrantError, match="stale file handle"):
        _write(staying, "second", overwrite=True)
    assert _tree(staying) == _expected("first")


def test_a_file_system_that_renames_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"
    _write(target, "first")
    real = Path.rename

    def rename(self: Path, other: Path) -> Path:
        if self == target:
            raise OSError(18, "Invalid cross-device link")
        return real(self, other)

    monkeypatch.setattr(Path, "rename", rename)
    _write(target, "second", overwrite=True)
    assert _tree(tmp_path) == {f"out/{name}": text for name, text in _expected("second").items()}


def test_the_earlier_output_returns_if_the_new_one_cannot_be_put_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    _write(target, "first")
    real = Path.rename

    def rename(self: Path, other: Path) -> Path:
        if self.name == "new":
            raise KeyboardInterrupt
        return real(self, other)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        _write(target, "second", overwrite=True)
    assert _tree(tmp_path) == {f"out/{name}": text for name, text in _expected("first").items()}


def test_a_link_to_a_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk" / "real").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "real")
    (tmp_path / "to come").symlink_to(tmp_path / "disk" / "new")
    for link, real in (("link", "real"), ("to come", "new")):
        for text in ("first", "second"):
            _write(tmp_path / link, text, overwrite=True)
            assert (tmp_path / link).is_symlink()
            assert _tree(tmp_path / "disk" / real) == _expected(text)


def _long(folder: Path) -> Path:
    return folder / ("x" * 256)


def _circle(folder: Path) -> Path:
    (folder / "circle").symlink_to(folder / "circle")
    return folder / "circle"


def _below_a_file(folder: Path) -> Path:
    (folder / "file").write_text("")
    return folder / "file" / "deep" / "out"


def _file(folder: Path) -> Path:
    (folder / "file").write_text("")
    return folder / "file"


@pytest.mark.parametrize("make", [_long, _circle, _below_a_file, _file])
def test_places_that_cannot_be_are_seen_first(make: Callable[[Path], Path], tmp_path: Path) -> None:
    with pytest.raises(CalibrantError, match=str(tmp_path)):
        check_output(make(tmp_path), overwrite=True)


@pytest.mark.parametrize("deep", ["out", "a/out", "a/b/c/out"])
def test_a_place_that_cannot_be_written_is_seen_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deep: str
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(CalibrantError, match="cannot be written, so"):
        check_output(tmp_path / deep, overwrite=False)


def test_the_longest_names_work(tmp_path: Path) -> None:
    for name in ("x" * 255, "ü" * 127, "." + "x" * 254):
        _write(tmp_path / name, "text")
        assert _tree(tmp_path / name) == _expected("text")
        with pytest.raises(CalibrantError, match=r"\.training: cannot be written"):
            companion(tmp_path / name, "training")
    with whole_file(tmp_path / ("y" * 255)) as beside:
        beside.write_text("text")
    assert (tmp_path / ("y" * 255)).read_text() == "text"


def test_a_companion_lies_on_the_file_system_of_its_output(staying: Path) -> None:
    inside = companion(staying, "training")
    assert inside.parent == staying
    inside.mkdir()
    check_output(staying, overwrite=False)
    _write(staying, "text")
    assert inside.is_dir()
    assert companion(staying.parent / "other", "training").parent != staying.parent / "other"


def test_the_next_run_removes_what_killed_ones_left(staying: Path) -> None:
    beside = staying.parent.parent / f"{staying.parent.name} beside"
    beside.mkdir()
    for _ in range(3):
        abandon(staying, "calibrant")
        abandon(beside, "out")
    _write(staying, "text")
    _write(beside / "out", "text")
    assert _tree(staying) == _tree(beside / "out") == _expected("text")
    assert [path.name for path in beside.iterdir()] == ["out"]
    abandon(beside, "file.html")
    with whole_file(beside / "file.html") as page:
        page.write_text("page")
    assert sorted(path.name for path in beside.iterdir()) == ["file.html", "out"]


def test_two_runs_at_once(tmp_path: Path) -> None:
    with staged(tmp_path / "a") as first, staged(tmp_path / "b") as second:
        for folder in (first, second):
            (folder / "manifest.json").write_text("")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "manifest.json", "manifest.json"]


_WRITES = """
import sys
from pathlib import Path
from calibrant.output_folder import staged
with staged(Path(sys.argv[1])) as folder:
    assert folder.is_relative_to(Path(sys.argv[1]).resolve())
    (folder / "manifest.json").write_text("")
assert [path.name for path in Path(sys.argv[1]).iterdir()] == ["manifest.json"]
"""


@pytest.mark.parametrize("mount", ["-t tmpfs -o size=1m tmpfs", "--bind source"])
def test_real_mount_points(tmp_path: Path, mount: str) -> None:
    for name in ("source", "volume"):
        (tmp_path / name).mkdir()
    script = f'mount {mount} volume || exit 77; "$1" -c "$2" volume'
    command = ["unshare", "-m", "sh", "-c", script, "sh", sys.executable, _WRITES]
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    if done.returncode == 77 or "unshare failed" in done.stderr:
        pytest.skip("this user cannot mount")
    assert done.returncode == 0, done.stderr


def test_an_output_that_holds_other_files_is_not_replaced(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    cb.compress(llama, output=out, recipe="rtn-w8a16")
    (out / "report.html").write_text("ours, made later")
    (out / ".DS_Store").write_text("of the system")
    cb.compress(llama, output=out, recipe="rtn-w8a16", overwrite=True)
    (out / "eval").mkdir()
    (out / "eval" / "result.json").write_text("{}")
    (out / "notes.txt").write_text("mine")
    with pytest.raises(CalibrantError, match=r"did not write \(eval/result.json, notes.txt\).*would remove them"):
        cb.prepare(llama, output=out, recipe="rtn-w8a16", overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"


def test_a_set_that_lies_beside_other_files_is_not_replaced(llama: Path, tmp_path: Path) -> None:
    made = random_set(llama)
    made.save(tmp_path / "set")
    made.save(tmp_path / "set", overwrite=True)
    (tmp_path / "set" / "notes.txt").write_text("mine")
    with pytest.raises(CalibrantError, match=r"did not write \(notes.txt\)"):
        made.save(tmp_path / "set", overwrite=True)
