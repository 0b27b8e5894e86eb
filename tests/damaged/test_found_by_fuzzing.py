"""Damaged files that benchmarks/fuzz_readers.py has found to be read wrongly."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import calibrant as cb
from calibrant.errors import CalibrantError
from calibrant.formats.input_rounding import INPUT_ROUNDING, read_input_rounding
from calibrant.modeling.checkpoint import ModelFolder
from calibrant.modeling.tokenizer import Tokenizer
from tests.conftest import write_model

HERE = Path(__file__).parent


def test_a_parquet_file_whose_metadata_end_the_process_of_the_library() -> None:
    with pytest.raises(CalibrantError, match=r"level_histogram\.parquet: not a readable Parquet file \(.*histogram"):
        list(cb.Corpus(HERE / "level_histogram.parquet"))


def test_an_index_with_a_name_that_no_file_can_have(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "llama")
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "x" * 10_000}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CalibrantError, match="shard is missing"):
        ModelFolder(folder)


def test_rounding_of_inputs_nested_a_thousand_times(tmp_path: Path) -> None:
    (tmp_path / INPUT_ROUNDING).write_text("[" * 100_000)
    with pytest.raises(CalibrantError, match="damaged"):
        read_input_rounding(tmp_path)


@pytest.mark.parametrize("identity", [{}, {"recipe": 1}, {"recipe": {"names": "r"}}])
def test_a_journal_that_does_not_name_its_recipe(tmp_path: Path, identity: dict[str, object]) -> None:
    journal = tmp_path / "out.journal"
    (journal / "set").mkdir(parents=True)
    (journal / "run.json").write_text(json.dumps(identity))
    with pytest.raises(CalibrantError, match=r"out\.journal: does not say what it makes; delete the folder"):
        cb.status(tmp_path / "out")


@pytest.mark.parametrize("state", ["blocks", "steps"])
def test_a_state_that_does_not_say_what_is_done(tmp_path: Path, state: str) -> None:
    journal = tmp_path / "out.journal"
    journal.mkdir()
    (journal / "run.json").write_text(json.dumps({"recipe": {"name": "r"}}))
    known = json.dumps({"dict": [["dones", 1]]})
    save_file({"0": torch.ones(1)}, journal / f"{state}.safetensors", {"calibrant.state": known})
    with pytest.raises(CalibrantError, match=f"its state {state} does not say 'done'"):
        cb.status(tmp_path / "out")


def test_a_group_size_of_infinity(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "llama")
    cb.compress(folder, output=tmp_path / "out", recipe="rtn-w8a16", bits=4, group_size=32)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] = float("inf")
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CalibrantError, match="quantization_config does not describe"):
        ModelFolder(tmp_path / "out", dequantize=True)


def test_a_vocabulary_without_its_unknown_token(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "llama")
    file = folder / "tokenizer.json"
    definition = json.loads(file.read_text())
    definition["model"]["unk_token"] = "missing"
    file.write_text(json.dumps(definition))
    tokenizer = Tokenizer(folder)
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch([text])):
        with pytest.raises(CalibrantError, match=r"its tokenizer cannot encode a text \(.*UNK"):
            encode("Grüße")
