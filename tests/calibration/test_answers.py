"""The source "answers": prompts as the chat template writes them, and what the model answers until it ends."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import calibrant as cb
from calibrant.calibration.sources.text_generation import sample
from calibrant.modeling.tokenizer import Tokenizer
from calibrant.randomness import make_rng

TEMPLATE = (
    "{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[a]<t>{% endif %}"
)
QUESTIONS = [f"{number}?" for number in range(40)]
LENGTH = 48


@pytest.fixture
def chat_model(llama: Path, tmp_path: Path) -> Path:
    folder = shutil.copytree(llama, tmp_path / "chat")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def answers(model: Path, corpus: Any = QUESTIONS, **options: Any) -> cb.CalibrationSet:
    given = {"samples": 12, "length": LENGTH, "seed": 3, "dtype": "float32", **options}
    return cb.generate(model, strategy="answers", corpus=cb.Corpus(corpus), **given)


def test_a_row_is_prompts_and_what_the_model_answers_to_each_alone(chat_model: Path) -> None:
    """Greedy answers are the chain of most likely tokens behind their prompt; after an end the next prompt comes."""
    made = answers(chat_model, temperature=cb.TemperatureSchedule(0.0, 0.0, 0))
    model, tokenizer = transformers.AutoModelForCausalLM.from_pretrained(chat_model), Tokenizer(chat_model)
    sampled = answers(chat_model, samples=40)
    assert sum(len(row) for row in sampled.manifest.rows) == sampled.manifest.counts["generations"] > 45
    for tokens, segments in zip(sampled.tokens.tolist(), sampled.manifest.rows, strict=True):
        for segment in segments:
            prompt = tokenizer.encode(f"[u]{QUESTIONS[int(segment.document)]}</s>[a]<t>")
            assert tokens[segment.start : segment.start + len(prompt)] == prompt[: segment.length]
        for segment in segments[1:]:
            assert tokens[segment.start - 1] == 2
    for row, segments in zip(made.tokens.long(), made.manifest.rows, strict=True):
        first, end = segments[0], segments[1].start if len(segments) > 1 else LENGTH
        with torch.no_grad():
            expected = model(row[None, :end]).logits[0].argmax(-1)
        assert row[first.length : end].tolist() == expected[first.length - 1 : end - 1].tolist()


def test_later_prompts_of_a_row_see_nothing_of_earlier_ones(chat_model: Path) -> None:
    """An answer's first token is what the row's draw gives to the prompt alone, at the schedule's first step."""
    made = answers(chat_model, samples=40, temperature=cb.TemperatureSchedule(0.5, 1.5, 2))
    model = transformers.AutoModelForCausalLM.from_pretrained(chat_model)
    later = 0
    for number, (row, segments) in enumerate(zip(made.tokens.long(), made.manifest.rows, strict=True)):
        uniform = torch.from_numpy(make_rng(3, "answers", 0, number).random(LENGTH))
        for segment in segments:
            end = segment.start + segment.length
            if end < LENGTH:
                later += segment.start > 0
                with torch.no_grad():
                    logits = model(row[None, segment.start : end]).logits[:, -1].float()
                assert row[end] == sample(logits, torch.ones(1, dtype=torch.float64), uniform[end : end + 1])
    assert later > 5


def test_the_mask_counts_what_the_model_wrote(chat_model: Path) -> None:
    whole, written = answers(chat_model), answers(chat_model, mask="assistant")
    assert torch.equal(whole.tokens, written.tokens)
    assert whole.mask.all()
    expected = torch.ones_like(whole.mask)
    for row, segments in enumerate(whole.manifest.rows):
        for segment in segments:
            expected[row, segment.start : segment.start + segment.length] = False
    assert torch.equal(written.mask, expected)
    assert written.mask.any(1).all()


def test_rows_depend_on_the_seed_and_not_on_the_batch(chat_model: Path, tmp_path: Path) -> None:
    made = answers(chat_model, mask="assistant", samples=5)
    assert torch.equal(made.tokens, answers(chat_model, samples=5, batch_size=2).tokens)
    assert made.sha256 != answers(chat_model, samples=5, seed=4).sha256
    other = answers(chat_model, samples=5, draw=1)
    firsts = [{row[0].document for row in one.manifest.rows} for one in (made, other)]
    assert len(firsts[0] | firsts[1]) == 10
    corpus = tmp_path / "prompts.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in QUESTIONS))
    saved = answers(chat_model, corpus, mask="assistant", samples=5)
    saved.head(3).save(tmp_path / "set")
    assert cb.rebuild(tmp_path / "set").calibration.sha256 == saved.head(3).sha256
    (chat_model / "chat_template.jinja").write_text(TEMPLATE.replace("<t>", "<T>"))
    with pytest.raises(cb.CalibrantError, match="Changed: the chat template"):
        cb.rebuild(tmp_path / "set")


def test_conversations_are_asked_up_to_their_first_answer(chat_model: Path) -> None:
    talk = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "theirs"},
        {"role": "user", "content": "more"},
    ]
    made = answers(chat_model, [talk, "x" * 60, [{"role": "assistant", "content": "hello"}]], samples=1)
    text = Tokenizer(chat_model).decode(made.tokens[0].tolist())
    assert text.startswith("[s]S</s>[u]Q</s>[a]<t>")
    assert "theirs" not in text
    counts = made.manifest.counts
    assert (counts["documents"], counts["prompts"], counts["prompts_too_long"]) == (3, 1, 1)
    assert counts["documents_without_a_prompt"] == 1


def test_what_answers_needs_is_said(llama: Path, chat_model: Path) -> None:
    with pytest.raises(cb.CalibrantError, match="chat template, and its tokenizer has none; choose a model"):
        answers(llama)
    with pytest.raises(cb.CalibrantError, match="40 prompts, but draw 3 of 12 rows needs 48"):
        answers(chat_model, draw=3)
    with pytest.raises(cb.CalibrantError, match=r"none of its 1 documents .* 24 tokens.*prompts_too_long 1"):
        answers(chat_model, ["x" * 60], samples=1)
    (chat_model / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(cb.CalibrantError, match="the first refused: roles must alternate"):
        answers(chat_model)
    for options, said in (
        ({"strategy": "answers"}, "name one with `corpus`"),
        ({"mask": "assistant"}, '`mask` is for `strategy="answers"`'),
        ({"strategy": "answers", "corpus": "c", "mask": "some"}, "no such mask"),
    ):
        with pytest.raises(cb.CalibrantError, match=said):
            cb.generate(chat_model, samples=2, length=16, **options)
