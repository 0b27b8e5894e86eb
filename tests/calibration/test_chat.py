"""Conversations: the template writes them, the mask counts what the assistant said, the manifest knows the template."""

import json
import shutil
from pathlib import Path
from typing import Any

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


def conversation(number: int) -> list[dict[str, Any]]:
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


@pytest.mark.parametrize("odd", ["hello there", "", None, [], [{"role": "user"}], 7])
@pytest.mark.parametrize("windows", ["document", "pack"])
def test_one_odd_row_is_left_out_of_what_the_assistant_wrote(
    corpus: Path, chat_model: Path, windows: str, odd: object, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"tokenizer": chat_model, "samples": 6, "length": 60, "windows": windows, "mask": "assistant"}
    without = cb.select(chat(corpus), **options)
    lines = corpus.read_text().splitlines(keepends=True)
    corpus.write_text("".join([*lines[:5], json.dumps({"messages": odd}) + "\n", *lines[5:]]))
    made = cb.select(chat(corpus), **options)
    assert made.mask.any()
    assert made.tokens.shape == without.tokens.shape
    assert made.manifest.counts.get("documents_without_messages", 0) == (odd == "hello there")


def test_what_conversations_need(corpus: Path, llama: Path, chat_model: Path, tmp_path: Path) -> None:
    with pytest.raises(cb.CalibrantError, match="no chat template"):
        cb.select(chat(corpus), tokenizer=llama, samples=2, length=20)
    text = tmp_path / "t.txt"
    text.write_text("just words " * 100)
    with pytest.raises(cb.CalibrantError, match=r"no document is left .*without messages"):
        cb.select(text, tokenizer=chat_model, samples=2, length=20, mask="assistant")
    (chat_model / "chat_template.jinja").write_text(
        "{{ messages|length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(cb.CalibrantError, match='use `mask="all"`'):
        cb.select(chat(corpus), tokenizer=chat_model, samples=2, length=20, mask="assistant")
    (chat_model / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(cb.CalibrantError, match="roles must alternate"):
        cb.select(chat(corpus), tokenizer=chat_model, samples=2, length=20)


EVERYTHING = (
    "{{ tools | length if tools else 'no' }} tools;{% for m in messages %}[{{ m.role }}{{ '=' + m.name if m.name }}]"
    "{{ m.content or '' }}{% if m.reasoning_content %}<{{ m.reasoning_content }}>{% endif %}"
    "{% for c in m.tool_calls or [] %}(call {{ c.function.name }} {{ c.function.arguments | tojson }}){% endfor %};"
    "{% endfor %}"
)
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "sun"}}}
TALK: dict[str, Any] = {
    "messages": [
        {"role": "user", "name": "ann", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "bright", "tool_call_id": "1"},
        {"role": "assistant", "content": "it is", "reasoning_content": "so"},
    ],
    "tools": [{"type": "function", "function": {"name": "look"}}],
}
SAID = '1 tools;[user=ann]one\ntwo;[assistant](call look {"at": "sun"});[tool]bright;[assistant]it is<so>;'


class Rows:
    def __init__(self, rows: list[Any]) -> None:
        self._rows = rows

    def __iter__(self) -> Any:
        return iter(self._rows)


def written(kind: str, rows: list[dict[str, Any]], folder: Path) -> cb.Corpus:
    path = folder / kind
    if kind == "c.jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "c.parquet":
        # Parquet has no union of texts and lists, so there every content is a list of parts.
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        return cb.Corpus(rows if kind == "list" else Rows(rows), "messages")
    return cb.Corpus(path, "messages")


@pytest.mark.parametrize("kind", ["c.jsonl", "c.parquet", "list", "data set"])
@pytest.mark.parametrize("as_json", [False, True])
def test_everything_of_a_conversation_reaches_the_template(llama, tmp_path: Path, kind: str, as_json: bool) -> None:
    folder = shutil.copytree(llama, tmp_path / "m")
    (folder / "chat_template.jinja").write_text(EVERYTHING)
    messages = TALK["messages"]
    if kind == "c.parquet":
        messages = [
            {**one, "content": [{"type": "text", "text": one["content"]}]} if isinstance(one["content"], str) else one
            for one in messages
        ]
    row = {"messages": messages, "tools": json.dumps(TALK["tools"]) if as_json else TALK["tools"]}
    made = cb.select(
        written(kind, [row] * 3, tmp_path), tokenizer=folder, samples=2, length=160, windows="document"
    )  # fmt: skip
    assert made.manifest.counts["documents_unusable"] == 0
    for tokens, mask in zip(made.tokens, made.mask, strict=True):
        assert Tokenizer(folder).decode(tokens[mask].tolist()).replace("<unk>", "\n") == SAID


def test_parts_reach_a_template_that_takes_them(llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "m")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{% for p in m.content %}<{{ p.text }}>{% endfor %}{% endfor %}"
    )
    row = {"messages": TALK["messages"][:1]}
    made = cb.select(
        cb.Corpus([row] * 3, "messages"), tokenizer=folder, samples=1, length=40, windows="document"
    )  # fmt: skip
    assert Tokenizer(folder).decode(made.tokens[0][made.mask[0]].tolist()) == "<one><two>"


@pytest.mark.parametrize("content", [
    "hi there",
    ["hi", " there"],
    [{"text": "hi there"}],
    [{"text": "hi"}, {"text": " there", "type": None}],
    ["hi", {"text": " there"}],
    [{"type": "text", "text": "hi"}, " there"],
])  # fmt: skip
@pytest.mark.parametrize("otherwise", ["", "{% if m.content is string %}{{ m.content }}{% else %}"])
def test_every_part_reaches_a_template_that_asks_for_its_type(llama: Path, tmp_path: Path, content, otherwise) -> None:
    folder = shutil.copytree(llama, tmp_path / "m")
    parts = "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"
    end = "{% endif %}" if otherwise else ""
    (folder / "chat_template.jinja").write_text("{% for m in messages %}" + otherwise + parts + end + "{% endfor %}")
    row = {"messages": [{"role": "user", "content": content}]}
    made = cb.select(
        cb.Corpus([row] * 3, "messages"), tokenizer=folder, samples=1, length=40, windows="document"
    )  # fmt: skip
    assert Tokenizer(folder).decode(made.tokens[0][made.mask[0]].tolist()) == "hi there"


def test_conversations_that_only_call_differ(llama: Path) -> None:
    def calls(name: str) -> dict[str, Any]:
        function = {**CALL["function"], "name": name}
        return {"messages": [{"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}]}

    corpus = cb.Corpus([calls("a"), calls("b"), calls("a")], "messages")
    assert len({document.text for document in corpus}) == 2
    assert corpus.counts["documents_empty"] == 0


@pytest.mark.parametrize("windows", ["pack", "document"])
@pytest.mark.parametrize("strategy", ["uniform", "zipcal", "zipcal in parts"])
def test_a_conversation_that_the_template_refuses_is_left_out(chat_model, tmp_path, windows, strategy) -> None:
    (chat_model / "chat_template.jinja").write_text(
        "{% if messages[0].role != 'user' %}{{ raise_exception('a user begins') }}{% endif %}" + TEMPLATE
    )
    good = [{"messages": conversation(number)} for number in range(12)]
    refused = {"messages": conversation(0)[1:]}
    options: dict[str, Any] = {"tokenizer": chat_model, "samples": 4, "length": 40, "windows": windows}
    options |= {"strategy": "zipcal", "parts": 2} if strategy == "zipcal in parts" else {"strategy": strategy}
    rows = [*good[:5], refused, *good[5:], refused]
    made = cb.select(written("c.jsonl", rows, tmp_path), **options)
    if strategy == "zipcal":
        clean = cb.select(cb.Corpus(good, "messages"), **options)
        assert (made.tokens == clean.tokens).all()
        assert made.manifest.counts["conversations_refused"] == 2
    assert made.manifest.chat_template_sha256
    assert made.manifest.chat_template_date == "2024-07-26"
    if windows == "document":
        tokenizer = Tokenizer(chat_model)
        assert all(tokenizer.decode(row.tolist()).startswith("[u]") for row in made.tokens)
    with pytest.raises(cb.CalibrantError, match="a user begins"):
        cb.select(cb.Corpus([refused] * 9, "messages"), **options)


def test_plain_texts_need_no_template_and_conversations_no_separator(llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "m")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for name in ("bos_token", "eos_token", "pad_token"):
        settings.pop(name, None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    texts = cb.Corpus(["a text of some words"] * 9)
    for windows in ("document", "window"):
        assert cb.select(texts, tokenizer=folder, samples=2, length=16, windows=windows).mask.all()
    with pytest.raises(cb.CalibrantError, match="neither an EOS nor a BOS token to put between documents"):
        cb.select(texts, tokenizer=folder, samples=2, length=16)
