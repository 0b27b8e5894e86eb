"""Conversations: the template writes them, the mask counts what the assistant said, the manifest knows the template."""

import json
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

import calibrant as cb
from calibrant.modeling.tokenizer import Tokenizer

TEMPLATE = (
    "{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[a]{% endif %}"
)


@pytest.fixture
def chat_model(llama: Path, tmp_path: Path) -> Path:
    folder = shutil.copytree(llama, tmp_path / "chat")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def conversation(number: int) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": f"how much is {number}?"},
        {"role": "assistant", "content": "as much as it is"},
        {"role": "user", "content": "oh"},
        {"role": "assistant", "content": f"yes {number}"},
    ]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps({"messages": conversation(number)}) + "\n" for number in range(30)))
    return path


def chat(corpus: Path) -> cb.Corpus:
    return cb.Corpus(corpus, "messages")


@pytest.mark.parametrize("windows", ["document", "pack"])
@pytest.mark.parametrize("strategy", ["uniform", "zipcal"])
def test_only_what_the_assistant_wrote_counts(
    corpus: Path, chat_model: Path, tmp_path: Path, windows, strategy
) -> None:
    options = {"tokenizer": chat_model, "samples": 4, "length": 60, "windows": windows, "strategy": strategy}
    made = cb.select(chat(corpus), mask="assistant", **options)
    tokenizer = Tokenizer(chat_model)
    for row, mask in zip(made.tokens, made.mask, strict=True):
        counted = tokenizer.decode(row[mask].tolist())
        assert "how much" not in counted
        assert "[u]" not in counted
        assert "is</s>" in counted or "yes" in counted
    whole = cb.select(chat(corpus), mask="all", **options)
    assert (whole.tokens == made.tokens).all()
    assert whole.mask.sum() > made.mask.sum()
    assert made.manifest.chat_template_sha256 is not None
    made.save(tmp_path / "set")
    assert cb.rebuild(tmp_path / "set").calibration.sha256 == made.sha256
    (chat_model / "chat_template.jinja").write_text(TEMPLATE.replace("</s>", " </s>"))
    with pytest.raises(cb.CalibrantError, match="Changed: the chat template"):
        cb.rebuild(tmp_path / "set")


def test_conversations_in_parquet_are_read_alike(corpus: Path, tmp_path: Path) -> None:
    rows = [json.loads(line)["messages"] for line in corpus.read_text().splitlines()]
    pyarrow.parquet.write_table(pyarrow.table({"messages": rows}), tmp_path / "c.parquet")
    left, right = list(chat(corpus)), list(chat(tmp_path / "c.parquet"))
    assert [(one.text, one.messages) for one in left] == [(one.text, one.messages) for one in right]


def test_special_tokens_can_be_left_out(corpus: Path, chat_model: Path) -> None:
    made = cb.select(chat(corpus), tokenizer=chat_model, samples=4, length=60, mask="no-special")
    assert ((made.tokens == 2) == ~made.mask).all()
    assert (~made.mask).any()


def test_what_conversations_need(corpus: Path, llama: Path, chat_model: Path, tmp_path: Path) -> None:
    with pytest.raises(cb.CalibrantError, match="no chat template"):
        cb.select(chat(corpus), tokenizer=llama, samples=2, length=20)
    text = tmp_path / "t.txt"
    text.write_text("just words " * 100)
    with pytest.raises(cb.CalibrantError, match="not a conversation"):
        cb.select(text, tokenizer=chat_model, samples=2, length=20, mask="assistant")
    (chat_model / "chat_template.jinja").write_text(
        "{{ messages|length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(cb.CalibrantError, match='use `mask="all"`'):
        cb.select(chat(corpus), tokenizer=chat_model, samples=2, length=20, mask="assistant")
    (chat_model / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(cb.CalibrantError, match="roles must alternate"):
        cb.select(chat(corpus), tokenizer=chat_model, samples=2, length=20)
