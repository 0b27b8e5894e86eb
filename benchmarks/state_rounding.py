"""What it changes to keep hidden states between blocks in bfloat16 where blocks compute in float32.

    python benchmarks/state_rounding.py MODEL --corpus TEXT --text HELD_OUT [--draws 3]

Such states would take half the memory or disk. Each draw of a calibration set compresses the model twice, with states
as they are and with states rounded after every block, and both are compared with the original by their divergence.
"""

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table

import calibrant as cb
from calibrant.modeling import inputs

RESULT = Path(__file__).parent / "results" / "state_rounding.json"


class RoundedStates:
    """Within, hidden states are rounded to bfloat16 between blocks."""

    def __enter__(self) -> None:
        self._advance = inputs.MicroBatch.advance

        def rounded(batch: inputs.MicroBatch, hidden: torch.Tensor, original: torch.Tensor | None = None) -> None:
            self._advance(batch, hidden.bfloat16().to(hidden.dtype), original)

        inputs.MicroBatch.advance = rounded  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        inputs.MicroBatch.advance = self._advance  # type: ignore[method-assign]


def compressed(given: argparse.Namespace, calibration: cb.CalibrationSet, rounds: bool) -> float:
    """Divergence of the compressed model from the original, in nats per token."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out"
        options: dict[str, Any] = {"output": output, "recipe": given.recipe, "dtype": "float32"}
        if rounds:
            with RoundedStates():
                cb.compress(given.model, calibration=calibration, **options)
        else:
            cb.compress(given.model, calibration=calibration, **options)
        found = cb.evaluate(output, against=given.model, text=given.text, length=512, limit=given.windows)
    assert found.divergence is not None
    return found.divergence.kl_mean


def main() -> None:
    """Compress twice for each draw and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--corpus", required=True, help="where calibration sets are drawn from")
    parser.add_argument("--text", required=True, help="held-out text")
    parser.add_argument("--recipe", default="gptq-w4a16")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--draws", type=int, default=3)
    given = parser.parse_args()
    runs = []
    for draw in range(given.draws):
        made = cb.select(given.corpus, tokenizer=given.model, samples=given.samples, length=given.length, draw=draw)
        exact, rounded = (compressed(given, made, rounds) for rounds in (False, True))
        runs.append({"draw": draw, "float32": exact, "bfloat16": rounded})
        print(runs[-1], file=sys.stderr, flush=True)
    differences = np.array([run["bfloat16"] / run["float32"] - 1 for run in runs])
    draws = np.array([run["float32"] for run in runs])
    table = Table("draw", "float32 states", "bfloat16 states", "difference")
    for run, difference in zip(runs, differences, strict=True):
        table.add_row(str(run["draw"]), f"{run['float32']:.4f}", f"{run['bfloat16']:.4f}", f"{difference:+.2%}")
    Console(width=shutil.get_terminal_size((100, 24)).columns).print(table)
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "system": platform.platform(),
        "processors": os.cpu_count(),
        "versions": {
            "calibrant": cb.__version__, "torch": torch.__version__, "transformers": transformers.__version__,
        },
        "model": Path(given.model).name,
        "recipe": given.recipe,
        "corpus": Path(given.corpus).name,
        "text": Path(given.text).name,
        "samples": given.samples,
        "length": given.length,
        "windows": given.windows,
        "mean_difference": float(differences.mean()),
        "standard_deviation_of_differences": float(differences.std(ddof=1)),
        "standard_deviation_over_draws": float(draws.std(ddof=1) / draws.mean()),
        "runs": runs,
    }  # fmt: skip
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
