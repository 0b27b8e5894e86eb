"""Temporary folders: what killed processes left goes, what a living process owns stays."""

import fcntl
import os
from pathlib import Path

import pytest

from calibrant import owned_folder
from calibrant.owned_folder import KEPT, remove_abandoned
from tests.abandoned import abandon


def test_what_killed_processes_left_is_removed_and_what_lives_stays(tmp_path: Path) -> None:
    for name in ("out", "out", "other", "n" * 255, "ü" * 127):
        abandon(tmp_path, name)
    assert len(list(tmp_path.glob(".*.partial"))) == 5
    with owned_folder.owned_folder(tmp_path, "out") as living:
        (living / "work").write_text("")
        remove_abandoned(tmp_path)
        assert [path.name for path in tmp_path.rglob("work")] == ["work"]
        assert list(tmp_path.iterdir()) == [living]
    assert list(tmp_path.iterdir()) == []


def test_what_may_be_somebody_elses_stays(tmp_path: Path) -> None:
    (tmp_path / ".download.partial").mkdir()
    (tmp_path / ".torrent.partial").write_text("")
    (tmp_path / ".empty.partial").mkdir()
    (tmp_path / ".empty.partial" / "calibrant.lock").write_text("")  # its owner is about to lock it
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    abandon(elsewhere, "out")
    (tmp_path / ".linked.partial").symlink_to(next(elsewhere.iterdir()))
    abandon(tmp_path, "out", KEPT)
    before = sorted(tmp_path.rglob("*"))
    remove_abandoned(tmp_path)
    remove_abandoned(tmp_path / "missing")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("network", [True, False])
def test_another_machines_folder_stays_where_its_lock_may_not_be_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: bool
) -> None:
    abandon(tmp_path, "out")
    monkeypatch.setattr(owned_folder, "_boot", lambda: "another machine, or the same one started again")
    monkeypatch.setattr(os, "major", lambda _: 0 if network else 8)
    remove_abandoned(tmp_path)
    assert len(list(tmp_path.iterdir())) == network


def test_a_file_system_without_locks_works_and_nothing_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    abandon(tmp_path, "first")

    def unsupported(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with owned_folder.owned_folder(tmp_path, "second"):
        remove_abandoned(tmp_path)
        assert len(list(tmp_path.iterdir())) == 2
    assert len(list(tmp_path.iterdir())) == 1
