"""A hook of the site: formulas become MathML, which browsers draw without a script or a network."""

import html
import re
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    """Replace the formulas that the extension arithmatex has marked."""

    def formula(found: re.Match[str]) -> str:
        display = "block" if found[2] == "[" else "inline"
        made = str(convert(html.unescape(found[3]), display=display))
        if "\\" in made:
            raise PluginError(f"a formula has a command that latex2mathml does not know: {found[3]}")
        return made

    return _FORMULA.sub(formula, content)
