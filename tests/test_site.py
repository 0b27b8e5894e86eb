"""The documentation's site: it builds without a warning, loads nothing from elsewhere, and is searched from disk."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.core import TyperGroup

import calibrant as cb
from calibrant.cli.main import app
from tests.browser import dumped, needs_browser

ROOT = Path(__file__).parent.parent
QUIET = {"NO_MKDOCS_2_WARNING": "1", "DISABLE_MKDOCS_2_WARNING": "true"}
FETCHED = re.compile(
    r"""(?:<(?:script|img|iframe)[^>]*\ssrc|<link[^>]*\srel="(?:stylesheet|icon)"[^>]*\shref)=["'](https?:[^"']+)"""
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    ran = subprocess.run(command, cwd=ROOT, env={**os.environ, **QUIET}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return folder


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 25
    assert {page.name: found for page in pages if (found := FETCHED.findall(page.read_text()))} == {}


def test_every_command_and_recipe_is_on_its_page(site: Path) -> None:
    commands = (site / "command-line.html").read_text()
    root = typer.main.get_command(app)
    assert isinstance(root, TyperGroup)
    for name, command in root.commands.items():
        parts = [f"{name}-{part}" for part in command.commands] if isinstance(command, TyperGroup) else [name]
        for part in parts:
            assert f'id="calibrant-{part}"' in commands, part
    recipes = (site / "builtin-recipes.html").read_text()
    assert all(f"<code>{name}</code>" in recipes for name in cb.builtin_recipes())
    assert "<math" in (site / "methods.html").read_text()


@needs_browser
def test_search_works_from_disk(site: Path, tmp_path: Path) -> None:
    page = dumped(f"{(site / 'index.html').as_uri()}?q=damping", tmp_path)
    found = re.findall(r'class="md-search-result__item"><a href="[^"]*/([\w-]+)\.html', page)
    assert {"recipes", "methods"} <= set(found)
