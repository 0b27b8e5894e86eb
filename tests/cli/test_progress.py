"""What a log shows of long operations."""

import pytest

from calibrant.cli import console


@pytest.fixture
def progress(monkeypatch: pytest.MonkeyPatch):
    """Progress of lines, as of standard error that is no terminal."""
    with console.terminal(quiet=False, as_json=False) as screen:
        yield screen.progress


@pytest.mark.parametrize(
    ("total", "unit", "last"),
    [(2000, "tokens", "2,000 of 2,000 tokens"), (4_000_000, "bytes", "4.0 MB of 4.0 MB"), (20, "", "20 of 20")],
)
def test_a_long_task_says_its_unit_ten_times(
    progress, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], total: int, unit: str, last: str
) -> None:
    monkeypatch.setattr(console, "_SHORT_SECONDS", 0)
    with progress.task("doing", total, unit) as task:
        for _ in range(20):
            task.advance(total // 20)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10
    assert lines[-1] == f"doing: {last}, 0 s"


def test_a_short_task_says_nothing(progress, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.task("doing", 3, "steps") as task:
        task.advance(3)
    assert capsys.readouterr().err == ""
