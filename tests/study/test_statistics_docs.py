"""The coverage that docs/statistics.md states is the coverage that was measured."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_tables_are_the_measured_numbers() -> None:
    measured = json.loads((ROOT / "benchmarks/results/statistics_coverage.json").read_text(encoding="utf-8"))
    stated = dict(re.findall(r"^\| (.+?) \| ([\d.| -]+) \|$", (ROOT / "docs/statistics.md").read_text("utf-8"), re.M))
    for name, shares in measured["shares"].items():
        kind, _, what = name.partition(": ")
        row = stated[name if kind == "found" else what]
        assert row == " | ".join("-" if share is None else f"{share:.3f}" for share in shares.values()), name
    for name, power in measured["power"].items():
        if not name.endswith("by formula"):
            assert stated[name] == f"{power:.3f}"
