"""Help of every command."""

import subprocess
import sys

import pytest


def test_help_needs_no_heavy_library() -> None:
    heavy = ("torch", "transformers", "numba", "rich.table")
    code = f"import sys, calibrant.cli.main; print([m for m in {heavy} if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


COMMANDS = [
    "",
    "compress",
    "data",
    "data generate",
    "data select",
    "data score",
    "data mix",
    "data rebuild",
    "data inspect",
    "evaluate",
    "report",
    "compare",
    "imatrix",
    "recipes",
    "demo",
]


@pytest.mark.parametrize("command", [name.split() for name in COMMANDS], ids=COMMANDS)
def test_every_command_explains_itself(run, command: list[str]) -> None:
    status, out, _ = run(*command, "--help")
    assert status == 0
    assert "Usage" in out
    if command and command != ["data"]:
        assert "Example: calibrant" in " ".join(out.split())
