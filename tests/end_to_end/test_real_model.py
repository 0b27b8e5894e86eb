"""The main job on the real demo model, small."""

import json
from pathlib import Path

import pytest
import torch
import transformers

import calibrant as cb
from calibrant.modeling.checkpoint import ModelFolder
from calibrant.modeling.whole_model import load_whole
from calibrant.recipes.recipe import load_recipe
from tests.checkpoints import put_stored_weights
from tests.llama_cpp import ask


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


def test_llama_cpp_says_what_transformers_says(smollm2: Path, tmp_path: Path) -> None:
    """The same tokens of texts, and nearly the same probabilities: llama.cpp rounds activations and embeddings."""
    recipe = load_recipe("rtn-w4a16-g128").with_weights(None, 32)
    cb.compress(smollm2, output=tmp_path / "out", recipe=recipe, checkpoint_format="gptq")
    written = cb.write_gguf(tmp_path / "out", output=tmp_path / "out.gguf")
    assert written.types == {"F32": 61, "Q4_0": 210, "Q8_0": 1}
    assert written.bytes < 0.25 * (smollm2 / "model.safetensors").stat().st_size
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    texts = ['In 1984 she didn\'t say: "étüde" costs $3,999.50!', "  def f(x):\n    return x\n\n\n# 日本語 🙂"]
    prompts = [
        tokenizer(text).input_ids for text in ("The capital of France is", "Water boils at a temperature of 100")
    ]
    said = ask(tmp_path / "out.gguf", 20, prompts[0][-1], texts=texts, prompts=prompts)
    assert said.tokens == [tokenizer(text).input_ids for text in texts]
    model = load_whole(ModelFolder(tmp_path / "out", allow_quantized=True), "cpu", "float32")
    for ids, after in zip(prompts, said.after, strict=True):
        with torch.inference_mode():
            ours = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        assert max(after, key=lambda index: after[index]) == int(ours.argmax())
        assert sum(abs(float(ours[index]) - value) for index, value in after.items()) / len(after) < 0.25
