"""What is replaced, what never is, and what a run that fails leaves behind."""

import shutil
from pathlib import Path

import pytest

from calibrant.engine.checkpoint_writer import CheckpointWriter
from calibrant.errors import CalibrantError
from calibrant.output_folder import staged
from tests.cli.damage import refused
from tests.conftest import random_set


def test_what_is_in_the_way_of_a_journal_is_seen_before_anything(run, llama: Path, tmp_path: Path) -> None:
    arguments = ("compress", llama, "-r", "zsaq-w4a8", "-o", tmp_path / "out", "--dry-run", "-q")
    assert run(*arguments)[0] == 0
    (tmp_path / "out.journal").mkdir()
    assert run(*arguments)[0] == 0
    (tmp_path / "out.journal" / "mine.txt").write_text("mine")
    status, out, err = run(*arguments)
    assert status == 2
    assert "in the way of the run's journal" in out + err


def test_a_page_replaces_pages_only(run, llama: Path, tmp_path: Path) -> None:
    random_set(llama).save(tmp_path / "set")
    page, other = tmp_path / "page.html", tmp_path / "corpus.csv"
    other.write_text("precious")
    for _ in range(2):
        assert run("data", "inspect", tmp_path / "set", "-m", llama, "--html", page, "-q")[0] == 0
    for place, said in (
        (other, "is not an inspection page"),
        (tmp_path / "no" / "x.html", "no such folder"),
        (tmp_path, "is not an inspection page"),
    ):
        status, _, err = run("data", "inspect", tmp_path / "set", "-m", llama, "--html", place, "-q")
        assert (status, said in err) == (2, True)
    assert other.read_text() == "precious"


def test_inputs_are_never_replaced(run, llama: Path, tmp_path: Path) -> None:
    model = shutil.copytree(llama, tmp_path / "deep" / "model")
    for target in (model, tmp_path / "deep"):
        select = ["data", "select", model, "-m", model]
        for command in (["compress", model, "-r", "rtn-w8a8"], ["data", "generate", model], select):
            status, _, err = run(*command, "-o", target, "--overwrite", "-q")
            assert status == 2
            assert "holds the input" in err
    assert (model / "model.safetensors").is_file()


def test_calibration_sets_and_recipes_are_never_replaced(run, llama: Path, tmp_path: Path) -> None:
    random_set(llama).save(tmp_path / "set")
    kept = (tmp_path / "set" / "tokens.safetensors").read_bytes()
    status, _, err = run("compress", llama, "-c", tmp_path / "set", "-o", tmp_path / "set", "--overwrite", "-q")
    assert status == 2
    assert "holds the input" in err
    assert (tmp_path / "set" / "tokens.safetensors").read_bytes() == kept
    recipe = tmp_path / "set" / "mine.yaml"
    recipe.write_text("name: mine\ndescription: d\nmethod: {name: rtn}\nscheme: {weights: {bits: 4}}\n")
    status, _, err = run("compress", llama, "-r", recipe, "-o", tmp_path / "set", "--overwrite", "-q")
    assert (status, "holds the input" in err) == (2, True)
    assert recipe.exists()


def test_only_earlier_outputs_are_overwritten(run, llama: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.jpg").write_bytes(b"x")
    status, out, err = run("compress", llama, "-r", "rtn-w8a8", "-o", photos, "--overwrite", "-q")
    refused(status, out, err, "no earlier output", photos)
    assert (photos / "a.jpg").is_file()
    for _ in range(2):
        assert run("compress", llama, "-r", "rtn-w8a8", "-o", tmp_path / "out", "--overwrite", "-q")[0] == 0
    assert not list(tmp_path.glob(".*"))


def test_a_folder_that_appears_during_the_run_is_kept(tmp_path: Path) -> None:
    def interrupted() -> None:
        with staged(tmp_path / "out"):
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "precious.txt").write_text("")

    with pytest.raises(CalibrantError, match="`overwrite=True` replaces it"):
        interrupted()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "precious.txt"]


def test_a_full_disk(run, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    from calibrant.formats import shards

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards, "save_file", full)
    status, out, err = run("compress", llama, "-o", tmp_path / "out", "-r", "rtn-w8a8", "-q")
    refused(status, out, err, "no space left", tmp_path)


def test_an_interrupt_leaves_nothing_behind(run, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(CheckpointWriter, "write_block", interrupted)
    status, _, err = run("compress", llama, "-o", tmp_path / "out", "-r", "rtn-w8a8", "-q")
    assert status == 130
    assert "interrupted" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("manifest.json", '{"manifest_version": 3}'),
        ("calibrant.json", "hello"),
        ("manifest.json", ""),
        ("calibrant.json", '{"calibrant": "a person"}'),
    ],
)
def test_folders_of_other_programs_are_never_replaced(
    run, llama: Path, tmp_path: Path, name: str, content: str
) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / name).write_text(content)
    status, _, err = run("compress", llama, "-r", "rtn-w8a8", "-o", tmp_path / "theirs", "--overwrite", "-q")
    assert (status, "no earlier output" in err) == (2, True)
    assert (tmp_path / "theirs" / name).read_text() == content


def test_an_importance_matrix_replaces_only_others(run, llama: Path, tmp_path: Path) -> None:
    model = shutil.copytree(llama, tmp_path / "model")
    random_set(model).save(tmp_path / "set")
    for target in (model / "model.safetensors", tmp_path / "set" / "tokens.safetensors", model / "config.json"):
        before = target.read_bytes()
        status, _, err = run("imatrix", model, "-c", tmp_path / "set", "-o", target, "--overwrite", "-q")
        assert (status, "no earlier GGUF file" in err) == (2, True)
        assert target.read_bytes() == before
    inside = tmp_path / "set" / "manifest.json" / "x.gguf"
    status, _, err = run("imatrix", model, "-c", tmp_path / "set", "-o", inside, "-q")
    assert (status, "is not a folder" in err) == (2, True)
    for _ in range(2):
        assert run("imatrix", model, "-c", tmp_path / "set", "-o", tmp_path / "x.gguf", "--overwrite", "-q")[0] == 0
