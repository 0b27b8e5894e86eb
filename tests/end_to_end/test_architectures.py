"""What the committed table of architectures says of each one is still planned: packed or dense, and how much of it."""

import json
import sys
import warnings
from pathlib import Path

import pytest
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import calibrant as cb
from calibrant.modeling.quietly import quietly

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))  # whose scripts import each other by name

from architectures import random_set, recipe, tiny_model, write_tokenizer  # noqa: E402

FOUND = json.loads((ROOT / "benchmarks" / "results" / "architectures.json").read_text())
WORKS = [one for one in FOUND["architectures"] if one["result"] == "works"]
# Those that also take images or sounds have tests of their own.
ROWS = {one["architecture"]: one for one in WORKS if one["architecture"] in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()}


def test_nineteen_of_twenty_architectures_that_could_be_made_are_compressed() -> None:
    made = [one for one in FOUND["architectures"] if one["result"] != "not shrunk"]
    assert len(WORKS) >= 0.95 * len(made)


@pytest.mark.skipif(
    transformers.__version__ != FOUND["versions"]["transformers"],
    reason=f"the table is of transformers {FOUND['versions']['transformers']}, others pack other models",
)
@pytest.mark.parametrize("architecture", ROWS)
def test_the_plan_is_that_of_the_table(architecture: str, tmp_path: Path) -> None:
    row = ROWS[architecture]
    with warnings.catch_warnings(), quietly():
        warnings.simplefilter("ignore")
        tiny_model(architecture, row["model_type"]).save_pretrained(tmp_path / "source")
        write_tokenizer(tmp_path / "source")
        prepared = cb.prepare(
            tmp_path / "source",
            output=tmp_path / "out",
            recipe=recipe(4, "gptq"),
            calibration=random_set(),
            dtype="float32",
        )
    assert ("packed" if prepared.plan.target.layout else "dense") == row["stored"]
    assert round(prepared.plan.share, 4) == row["share"]
