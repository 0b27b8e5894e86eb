import json
import sys
from pathlib import Path

import pytest

import calibrant as cb
from calibrant.study.study import StudyRun
from tests.cli.damage import refused
from tests.report.study_store import plan, write_study


def test_report_writes_where_it_is_told(run, tmp_path: Path) -> None:
    write_study(tmp_path / "study", plan(draws=2, samples=8))
    status, shown, _ = run("study", "report", tmp_path / "study", "-o", tmp_path / "out", "--paired", "--json")
    assert status == 0
    assert json.loads(shown) == {"report": str(tmp_path / "out" / "report.html")}
    assert (tmp_path / "out" / "tables" / "sources.tex").is_file()
    assert "draw by draw" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    status, shown, _ = run("study", "report", tmp_path / "study")
    assert status == 0
    assert "draw by draw" not in (tmp_path / "study" / "report.html").read_text(encoding="utf-8")
    assert (tmp_path / "study" / "report.html").is_file()
    assert "report.html" in shown


def test_report_names_the_extra_that_it_needs(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_study(tmp_path / "study", plan(draws=1, samples=8))
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    status, out, err = run("study", "report", tmp_path / "study")
    refused(status, out, err, "pip install 'calibrant[report]'", tmp_path)


def test_run_writes_the_report_or_says_why_not(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = StudyRun(write_study(tmp_path, plan(draws=1, samples=8)).folder, 7, [])
    monkeypatch.setattr(cb, "run_study", lambda *arguments, **options: ran)
    status, shown, _ = run("study", "run", tmp_path / "study.yaml", "--json")
    assert status == 0
    assert json.loads(shown)["report"] == str(tmp_path / "report.html")
    assert "Study: made" in (tmp_path / "report.html").read_text(encoding="utf-8")
    monkeypatch.setitem(sys.modules, "altair", None)
    status, shown, err = run("study", "run", tmp_path / "study.yaml", "--json")
    assert status == 0
    assert json.loads(shown)["report"] is None
    assert err.count("no report: a page with charts needs the extra: pip install 'calibrant[report]'") == 1
