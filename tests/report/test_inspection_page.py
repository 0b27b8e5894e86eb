import sys

import pytest

from calibrant.errors import CalibrantError
from calibrant.report.inspection_page import inspection_page


@pytest.mark.parametrize("library", ["altair", "vl_convert"])
def test_the_page_names_the_extra_that_it_needs(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(CalibrantError, match=r"needs the extra: pip install 'calibrant\[report\]'"):
        inspection_page([], [])
