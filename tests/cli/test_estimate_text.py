"""What ``--dry-run`` says of time."""

import pytest

from calibrant.cli.compress import time_text


@pytest.mark.parametrize(
    ("least", "most", "text"),
    [
        (3.2, 6.1, "3 to 6 seconds"),
        (0.1, 0.4, "1 second"),
        (45, 82, "45 to 82 seconds"),
        (115, 218, "2 to 4 minutes"),
        (185, 190, "3 minutes"),
        (7300, 13000, "2 to 4 hours"),
    ],
)
def test_a_range_of_time(least: float, most: float, text: str) -> None:
    assert time_text(least, most) == text
