import math
from pathlib import Path

import pytest
import torch
import transformers

import calibrant as cb
from calibrant.calibration.corpus import Corpus
from calibrant.evaluation.comparison import evaluate_models
from calibrant.evaluation.original import (
    RememberingOriginal,
    StoredOriginal,
    WholeOriginal,
    store_states,
    stored_windows,
)
from calibrant.evaluation.text import evaluation_windows
from calibrant.modeling.checkpoint import ModelFolder
from calibrant.modeling.find_blocks import find_blocks
from calibrant.modeling.tokenizer import Tokenizer
from calibrant.modeling.whole_model import load_whole
from calibrant.progress import NoProgress

from ..conftest import ARCHITECTURES


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "t.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    return path


def test_perplexity_is_the_exponential_of_the_mean_loss(llama: Path, text: Path) -> None:
    found = cb.evaluate(llama, text=text, length=32)
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    windows = evaluation_windows(Corpus(text), Tokenizer(llama), 32, None).windows
    with torch.no_grad():
        losses = [float(model(input_ids=window[None], labels=window[None]).loss) for window in windows]
    assert found.perplexity.value == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert found.perplexity.low < found.perplexity.value < found.perplexity.high


@pytest.mark.parametrize("method", ["hqq-w4a16", "rtn-w8a16", "rtn-w8a8", "magnitude-2:4"])
def test_evaluating_a_compressed_model_prints_nothing(
    llama: Path, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], method: str
) -> None:
    cb.compress(llama, output=tmp_path / "out", recipe=method)
    cb.evaluate(tmp_path / "out", against=llama, text=text, length=32)
    assert capfd.readouterr() == ("", "")


def test_a_model_does_not_diverge_from_itself(llama: Path, text: Path) -> None:
    divergence = cb.evaluate(llama, against=llama, text=text, length=32).divergence
    assert divergence is not None
    assert abs(divergence.kl_mean) < 1e-7
    assert divergence.same_top == 1.0
    assert divergence.log_ratio == 0.0


def test_divergence_equals_its_definition(model_folder, llama: Path, text: Path) -> None:
    """Computed in float64, for two different models."""
    original = transformers.AutoModelForCausalLM.from_pretrained(llama).eval()
    other = transformers.AutoModelForCausalLM.from_pretrained(model_folder("mistral")).eval()
    text_windows = evaluation_windows(Corpus(text), Tokenizer(llama), 32, 5)
    windows = text_windows.windows
    found = evaluate_models(other, WholeOriginal(original), text_windows, NoProgress()).divergence
    with torch.no_grad():
        p = original(input_ids=windows).logits[:, :-1].double().log_softmax(-1)
        q = other(input_ids=windows).logits[:, :-1].double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    target = windows[:, 1:, None]
    ratio = (p.gather(2, target) - q.gather(2, target)).mean((1, 2))
    assert found is not None
    assert found.kl_mean == pytest.approx(float(kl.mean()), rel=1e-3, abs=1e-7)
    assert found.kl_standard_error == pytest.approx(float(kl.mean(1).std() / math.sqrt(5)), rel=1e-2, abs=1e-8)
    assert found.kl_percentiles["99"] == pytest.approx(float(kl.flatten().quantile(0.99)), rel=1e-2, abs=1e-7)
    assert found.same_top == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert found.log_ratio == pytest.approx(float(ratio.mean()), rel=1e-3, abs=1e-6)


def test_windows_do_not_overlap_and_the_rest_is_counted(llama: Path, text: Path) -> None:
    found = evaluation_windows(Corpus(text), Tokenizer(llama), 32, 3)
    assert found.windows.shape == (3, 32)
    assert found.tokens_dropped == found.tokens_found - 3 * 32


def test_a_short_text_is_refused(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "s.txt").write_text("short")
    with pytest.raises(cb.CalibrantError, match="fewer than one window"):
        cb.evaluate(llama, text=tmp_path / "s.txt", length=32)


def test_a_text_that_is_too_long_to_be_tokenized_at_once_is_refused(llama: Path, monkeypatch) -> None:
    monkeypatch.setattr("calibrant.evaluation.text._MOST_CHARACTERS", 1000)
    with pytest.raises(cb.CalibrantError, match="more than 1,000 characters of text; give a part of it"):
        evaluation_windows(cb.Corpus(["word " * 100] * 3), Tokenizer(llama), 32, 1)
    assert len(evaluation_windows(cb.Corpus(["word " * 100] * 2), Tokenizer(llama), 32, 1).windows) == 1


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if not name.startswith("bert")])
def test_stored_states_compare_as_the_whole_original_does(
    architecture: str, model_folder, text: Path, tmp_path: Path
) -> None:
    folder = ModelFolder(model_folder(architecture))
    original = load_whole(folder, "cpu", "float32")
    windows = evaluation_windows(Corpus(text), Tokenizer(folder.path), 32, 3)
    store_states(original, folder, windows.windows, tmp_path, NoProgress())
    assert stored_windows(tmp_path).equal(windows.windows)
    stored = StoredOriginal(folder, tmp_path, torch.device("cpu"))
    other = _perturbed(load_whole(folder, "cpu", "float32"))
    expected = evaluate_models(other, WholeOriginal(original), windows, NoProgress())
    found = evaluate_models(other, stored, windows, NoProgress())
    assert expected.divergence is not None
    assert found.divergence is not None
    assert expected.divergence.kl_mean > 1e-4
    assert found.divergence.kl_by_window == pytest.approx(expected.divergence.kl_by_window, rel=1e-3)
    assert found.loss_by_window == expected.loss_by_window


@torch.inference_mode()
@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if not name.startswith("bert")])
def test_an_original_that_remembers_gives_the_same_logits_and_runs_its_blocks_once(
    architecture: str, model_folder, text: Path, tmp_path: Path
) -> None:
    folder = ModelFolder(model_folder(architecture))
    model = load_whole(folder, "cpu", "float32")
    windows = evaluation_windows(Corpus(text), Tokenizer(folder.path), 32, 2).windows
    expected = [WholeOriginal(model).logits(0, window) for window in windows]
    remembering, calls = RememberingOriginal(model, tmp_path), []
    for index in (0, 1, 1, 0):
        if index == 1 and not calls:
            block = model.get_submodule(find_blocks(model)[0])
            block.register_forward_hook(lambda *_: calls.append(1))
        torch.testing.assert_close(remembering.logits(index, windows[index]), expected[index], rtol=1e-4, atol=1e-4)
    assert len(calls) == 1


@torch.inference_mode()
def test_an_original_whose_head_begins_with_a_module_of_its_own_runs_every_time(tmp_path: Path) -> None:
    config = transformers.RobertaConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, is_decoder=True
    )
    model = transformers.RobertaForCausalLM(config).eval()
    window = torch.arange(4, 20)
    remembering = RememberingOriginal(model, tmp_path)
    for _ in range(2):
        assert torch.equal(remembering.logits(0, window), WholeOriginal(model).logits(0, window))
    assert not list(tmp_path.iterdir())


@torch.inference_mode()
def test_an_original_whose_head_needs_more_than_its_states_runs_every_time(
    model_folder, text: Path, tmp_path: Path
) -> None:
    folder = ModelFolder(model_folder("llama"))
    model = load_whole(folder, "cpu", "float32")
    window = evaluation_windows(Corpus(text), Tokenizer(folder.path), 32, 1).windows[0]
    embedded: list[torch.Tensor] = []

    def raise_logits(_: torch.nn.Module, __: object, output: transformers.utils.ModelOutput) -> None:
        output.logits.add_(float(len(embedded)))  # 1 if the embedding ran, 0 in the head alone
        embedded.clear()

    model.model.embed_tokens.register_forward_hook(lambda _, __, output: embedded.append(output))
    model.register_forward_hook(raise_logits)
    expected = WholeOriginal(model).logits(0, window)
    remembering = RememberingOriginal(model, tmp_path)
    assert all(torch.equal(remembering.logits(0, window), expected) for _ in range(2))
    assert not list(tmp_path.glob("*.safetensors"))


def test_models_compared_together_are_evaluated_as_each_alone(llama: Path, text: Path, tmp_path: Path) -> None:
    outputs = [tmp_path / "4", tmp_path / "2"]
    for output, bits in zip(outputs, (4, 2), strict=True):
        cb.compress(llama, output=output, recipe="rtn-w8a16", bits=bits)
    together = cb.compare(outputs, against=llama, text=text, length=32).evaluations
    for output, found in zip(outputs, together.values(), strict=True):
        alone = cb.evaluate(output, against=llama, text=text, length=32)
        assert found.loss_by_window == alone.loss_by_window
        assert alone.divergence is not None
        assert found.divergence is not None
        assert found.divergence.kl_by_window == pytest.approx(alone.divergence.kl_by_window, rel=1e-3)


def _perturbed(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter += 0.1 * parameter.std(correction=0) * noise
    return model
