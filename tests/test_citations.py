"""Documentation that the code cites is in the repository, and the cited section exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "calibrant"
MODULES = sorted(PACKAGE.rglob("*.py"))
# docs/NAME.md "Heading"
CITATION = re.compile(r'docs/([\w-]+\.md)(?: "([^"]+)")?')
# Documents outside the repository.
ABSENT = re.compile(r"(?<!docs/)\b(?:methods|formats|style|protocols)\.md|\bDESIGN\b|\bshared/")


def text_of(module: Path) -> str:
    """The module's source on one line, so that a citation that wraps is found too."""
    return re.sub(r"\s*\n\s*(?:# )?", " ", module.read_text(encoding="utf-8"))


def headings(document: Path) -> set[str]:
    """Headings of ``document`` and the first cells of its table rows."""
    lines = document.read_text(encoding="utf-8").splitlines()
    found = [re.match(r"#+ (.+)|\| ([^|]+) \|", line) for line in lines]
    return {(match[1] or match[2]).strip() for match in found if match}


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_cited_section_exists(module: Path) -> None:
    citations = CITATION.findall(text_of(module))
    unresolved = [
        f'docs/{name} "{heading}"'
        for name, heading in citations
        if not (ROOT / "docs" / name).is_file() or heading not in headings(ROOT / "docs" / name)
    ]
    assert unresolved == []


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_document_outside_the_repository_is_cited(module: Path) -> None:
    assert ABSENT.findall(text_of(module)) == []
