"""The main job on the real demo model, small."""

import json
from pathlib import Path

import pytest
import torch
import transformers

import calibrant as cb
from calibrant.recipes.recipe import load_recipe
from tests.checkpoints import put_stored_weights


@pytest.fixture(scope="module")
def made(smollm2: Path) -> cb.CalibrationSet:
    return cb.generate(smollm2, samples=24, length=96)


@pytest.fixture(scope="module")
def compressed(smollm2: Path, made: cb.CalibrationSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("real") / "out"
    cb.compress(smollm2, output=output, recipe="gptq-w4a16-g64", calibration=made)
    return output


def test_the_written_model_computes_what_was_solved(smollm2: Path, compressed: Path) -> None:
    original = transformers.AutoModelForCausalLM.from_pretrained(smollm2).eval()
    put_stored_weights(original, compressed, group_size=64)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(compressed).eval()
    tokens = torch.arange(5, 69)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, original(tokens).logits, rtol=1e-5, atol=1e-4)


def test_it_stays_closer_to_the_original_than_rounding_does(smollm2: Path, compressed: Path, tmp_path: Path) -> None:
    rounding = load_recipe("rtn-w4a16-g128").with_weights(None, 64)
    cb.compress(smollm2, output=tmp_path / "out", recipe=rounding)
    kl = {}
    for folder in (compressed, tmp_path / "out"):
        divergence = cb.evaluate(folder, against=smollm2, length=128, limit=8).divergence
        assert divergence is not None
        kl[folder] = divergence.kl_mean
    assert kl[compressed] < kl[tmp_path / "out"]


def test_the_text_it_wrote_is_text(smollm2: Path, made: cb.CalibrationSet) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    words = tokenizer.decode(made.tokens.flatten()).split()
    assert sum(word.isalpha() for word in words) > 0.5 * len(words)


def test_real_text_and_a_pruned_model(smollm2: Path, shared_data: Path, tmp_path: Path) -> None:
    corpus = shared_data / "exllama_cal" / "wiki.utf8.gz"
    data = cb.select(corpus, tokenizer=smollm2, samples=8, length=64)
    cb.compress(smollm2, output=tmp_path / "out", recipe="wanda-2:4", calibration=data)
    record = json.loads((tmp_path / "out" / "calibrant.json").read_text())
    assert all(layer["zeros"] >= layer["elements"] // 2 for layer in record["layers"])
    assert record["calibration"]["corpora"][0]["name"] == "wiki.utf8.gz"
