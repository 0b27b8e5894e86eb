"""Pages in a real browser, without a network."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

_BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(_BROWSER is None, reason="no Chromium is installed")


def seen(page: str, probe: str, width: int, folder: Path, *, dark: bool = False) -> tuple[dict[str, Any], list[str]]:
    """What ``probe``, the body of an async function, returns inside the page, and what the page said on the console.

    The page is in a frame, which may be narrower than a window can be.
    """
    script = (
        f"<script>(async () => {{ {probe} }})().catch((error) => ({{ error: String(error) }})).then((seen) =>"
        " parent.document.body.setAttribute('data-seen', JSON.stringify(seen)));</script>"
    )
    before, _, after = page.rpartition("</body>")  # libraries on the page may have such a text
    framed = html.escape(f"{before}{script}</body>{after}")
    file = folder / "framed.html"
    frame = f'<iframe width="{width}" height="900" style="border:0" srcdoc="{framed}"></iframe>'
    file.write_text(f'<!doctype html><meta charset="utf-8"><body>{frame}</body>', encoding="utf-8")
    content, console = _opened(file.as_uri(), folder, width, dark)
    found = re.search(r'data-seen="([^"]*)"', content)
    assert found, "the probe did not end"
    return json.loads(html.unescape(found.group(1))), console


def dumped(address: str, folder: Path) -> str:
    """The document at ``address`` after its scripts have run."""
    return _opened(address, folder, 1200, False)[0]


def _opened(address: str, folder: Path, width: int, dark: bool) -> tuple[str, list[str]]:
    """The document and what it said on the console; the browser's profile lies in ``folder``."""
    command = [
        str(_BROWSER),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--window-size={max(width, 500) + 20},1000",
    ]
    command += [f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", "--virtual-time-budget=60000"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND"]
    command += ["--blink-settings=preferredColorScheme=0"] if dark else []
    ran = subprocess.run([*command, "--dump-dom", address], capture_output=True, text=True, timeout=180, check=True)
    return ran.stdout, [line for line in ran.stderr.splitlines() if ":CONSOLE" in line]
