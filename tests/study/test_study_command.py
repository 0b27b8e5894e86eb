"""The command line of studies."""

import json
from pathlib import Path

import pytest

import calibrant as cb

from ..cli.conftest import call
from .small_study import write_plan


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    return lambda *arguments: call(*arguments, monkeypatch=monkeypatch, capsys=capsys)


def test_a_plan_says_what_it_takes(run, folder: Path) -> None:
    status, out, _ = run("study", "plan", folder / "study.yaml", "--cache", folder / "cache", "--json")
    found = json.loads(out)
    assert status == 0
    assert (found["cells"], found["done"], found["sets"]) == (6, 0, 2)
    assert 0 < found["seconds"][0] < found["seconds"][1]
    assert not (folder / "cache").exists()


def test_a_plan_knows_what_its_study_holds(run, whole: Path, tmp_path: Path) -> None:
    """Also without the cache, as after a clone; a changed plan has cells left."""
    options = ("--cache", tmp_path / "cache", "--json")
    status, out, _ = run("study", "plan", whole.parent / "study.yaml", *options)
    found = json.loads(out)
    assert status == 0
    assert (found["cells"], found["done"], found["sets"], found["seconds"]) == (6, 6, 0, [0, 0])
    status, out, _ = run("study", "plan", whole.parent / "study.yaml", *options, "-o", tmp_path / "another")
    assert json.loads(out)["done"] == 0


def test_keys_of_a_plan_are_not_called_options(run, folder: Path) -> None:
    (folder / "short.txt").write_text("sun")
    write_plan(folder / "study.yaml", texts={"short": {"corpus": "short.txt", "length": 16}})
    status, _, err = run("study", "plan", folder / "study.yaml", "--cache", folder / "cache")
    assert status == 2
    assert "give more text or a shorter `length`" in err
    write_plan(folder / "study.yaml", recipes="rtn-w4a16-g128")
    status, _, err = run("study", "plan", folder / "study.yaml", "--cache", folder / "cache")
    assert status == 2
    assert "`group_size: 0` takes one scale per channel" in err


def test_a_finished_study_is_shown_and_exported(run, whole: Path, tmp_path: Path) -> None:
    status, out, _ = run("study", "show", whole)
    assert status == 0
    assert "kl on held-out: llama0, wanda, 4 x 16" in out
    assert "vocabulary" in out
    status, out, _ = run("study", "show", whole, "--json")
    assert {one["setting"]["recipe"] for one in json.loads(out)["settings"]} == {"rtn", "wanda"}
    status, out, _ = run("study", "export", whole, "-o", tmp_path / "tables")
    assert status == 0
    assert (tmp_path / "tables" / "scores.csv").is_file()


def test_draws_that_a_given_difference_needs(run, folder: Path) -> None:
    """Fewer for a larger difference, and not those for the difference that was seen."""
    write_plan(folder / "study.yaml", recipes="wanda.yaml", samples=2, draws=2, repeat=False)
    run("study", "run", folder / "study.yaml", "--cache", folder / "cache")
    study = cb.Study(folder / "small")
    for difference, fewer in ((1e-4, 1e-2), (1e-2, 1.0)):
        for one, other in zip(
            study.analyse(difference=difference).settings, study.analyse(difference=fewer).settings, strict=True
        ):
            if one.best_two is not None and one.best_two.sd > 0:
                assert (one.best_two.to_see, other.best_two.to_see) == (difference, fewer)
                assert other.best_two.draws <= (one.best_two.draws or 1_000_000)
    kl = next(one.best_two for one in study.analyse(difference=1e-3).settings if one.setting.measure == "kl")
    status, out, _ = run("study", "show", folder / "small", "--difference", "1e-3")
    assert status == 0
    assert f"{kl.draws:,} draws of each of two sources would show a difference of 0.001" in " ".join(out.split())
    assert "would show a difference" not in run("study", "show", folder / "small")[1]
    status, _, err = run("study", "show", folder / "small", "--difference", "0")
    assert (status, "use a number above 0" in err) == (2, True)


def test_a_search_with_a_failed_source_names_it_and_ends_in_status_1(run, folder: Path) -> None:
    (folder / "short.txt").write_text("the red dog")
    sources = {"short": {"corpus": "short.txt"}, "vocabulary": {"strategy": "vocabulary"}}
    write_plan(folder / "study.yaml", sources=sources, recipes="rtn.yaml", samples=2, most_draws=3)
    status, out, _ = run("study", "recommend", folder / "study.yaml", "--cache", folder / "cache")
    said = " ".join(out.split())
    assert status == 1
    assert "Nothing can be recommended: vocabulary has nothing to be compared with" in said
    assert "short failed and is not compared." in said


def test_failed_cells_are_named_and_end_in_status_1(run, folder: Path) -> None:
    (folder / "short.txt").write_text("the red dog")
    sources = {"short": {"corpus": "short.txt"}}
    write_plan(folder / "study.yaml", sources=sources, recipes="rtn.yaml", samples=2, repeat=False)
    status, out, _ = run("study", "run", folder / "study.yaml", "--cache", folder / "cache")
    assert status == 1
    assert "failed: llama0, rtn, short, draw 0, 2 x 16:" in out
    assert "0 of 1 cells are done" in out


@pytest.mark.parametrize("command", ["show", "export"])
def test_no_study_is_one_sentence(run, tmp_path: Path, command: str) -> None:
    status, _, err = run("study", command, tmp_path, *(["-o", tmp_path / "out"] if command == "export" else []))
    assert status == 2
    assert err.count("\n") == 1
    assert "study.sqlite: does not exist; run the study first" in err
