"""The tables of docs/measurements.md are those of the committed results."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_tables_are_of_todays_results() -> None:
    spec = importlib.util.spec_from_file_location("measurement_page", ROOT / "benchmarks" / "measurement_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = (ROOT / "docs" / "measurements.md").read_text(encoding="utf-8")
    assert module.with_tables(page) == page
    assert page.count("(`best-") >= 10
