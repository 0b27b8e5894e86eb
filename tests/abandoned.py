"""What a killed process leaves behind."""

import multiprocessing
import os
from pathlib import Path

from calibrant.owned_folder import owned_folder


def _killed(parent: Path, name: str, files: tuple[str, ...]) -> None:
    with owned_folder(parent, name) as folder:
        for file in files:
            (folder / file).mkdir()
            (folder / file / "half").write_text("half")
        os._exit(9)


def abandon(parent: Path, name: str, *files: str) -> None:
    """Let a process end within ``owned_folder``, with subfolders ``files`` in it."""
    process = multiprocessing.get_context("fork").Process(target=_killed, args=(parent, name, files or ("new",)))
    process.start()
    process.join()
    assert process.exitcode == 9
