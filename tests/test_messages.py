"""The library speaks Python: only the command line names its options."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "calibrant"
MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.relative_to(PACKAGE).parts[0] != "cli"]
OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")


def string_literals(tree: ast.AST) -> Iterator[ast.Constant]:
    """Every string of a module, parts of f-strings included; a string that is a statement is a docstring."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_message_names_a_command_line_option(module: Path) -> None:
    literals = string_literals(ast.parse(module.read_text(encoding="utf-8")))
    assert [(node.lineno, OPTION.findall(node.value)) for node in literals if OPTION.search(node.value)] == []
