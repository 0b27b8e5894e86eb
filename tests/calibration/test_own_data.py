"""Texts and token ids that the caller already has."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import calibrant as cb
from calibrant.modeling.tokenizer import Tokenizer

TEXTS = [
    "a text of some words",
    "another one, a little longer than the first",
    "  ",
    "short",
    "the last of the texts",
] * 8


class Rows:
    """What a data set of the library ``datasets`` is to a corpus: rows as dicts, read anew in every pass."""

    def __init__(self, texts: list[str]) -> None:
        self._texts = texts

    def __len__(self) -> int:
        return len(self._texts)

    def __iter__(self) -> Iterator[dict[str, str]]:
        return ({"body": text, "url": "x"} for text in self._texts)


class Table:
    """What a data frame of pandas is to a corpus."""

    columns = ("text", "url")

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def to_dict(self, orient: str) -> list[dict[str, str]]:
        return [{"text": text, "url": orient} for text in TEXTS]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


@pytest.mark.parametrize("strategy", ["uniform", "zipcal", "zipcal-multi", "unigram", "perplexity"])
def test_texts_in_memory_give_what_a_file_of_them_gives(file: Path, llama: Path, strategy) -> None:
    common = {"tokenizer": llama, "strategy": strategy, "samples": 4, "length": 30, "seed": 1}
    made = cb.select(cb.Corpus(TEXTS), **common)
    assert made.sha256 == cb.select(file, **common).sha256
    (described,) = made.manifest.corpora
    assert (described["kind"], described["documents"]) == ("memory", 40)
    assert made.manifest.locations["corpora"] == ["memory"]


@pytest.mark.parametrize("kind", ["list", "iterator", "documents", "rows"])
def test_every_kind_of_texts_is_one_corpus(kind: str) -> None:
    given = {
        "list": TEXTS,
        "iterator": (text for text in TEXTS),
        "documents": [cb.Document(str(number), text) for number, text in enumerate(TEXTS)],
        "rows": Rows(TEXTS),
    }[kind]
    corpus = cb.Corpus(given, field="body")
    first, again = list(corpus), list(corpus)
    assert first == again
    assert [document.text for document in first] == [text for text in TEXTS if text.strip()]
    assert [document.id for document in first[:3]] == ["0", "1", "3"]
    assert corpus.counts["documents_empty"] == 8
    assert corpus.describe() == cb.Corpus(TEXTS).describe()
    assert corpus.describe() != cb.Corpus(TEXTS[:-1]).describe()


def test_conversations_and_ids_of_the_caller() -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    corpus = cb.Corpus([messages, cb.Document("mine", "text"), {"text": None}])
    assert [(document.id, document.text) for document in corpus] == [("0", "hi\nhello"), ("mine", "text")]


@pytest.mark.parametrize(("speaker", "role"), [
    ("human", "user"), ("user", "user"), ("gpt", "assistant"), ("assistant", "assistant"), ("system", "system"),
    ("tool", "tool"),
])  # fmt: skip
def test_messages_of_sharegpt_are_renamed(speaker: str, role: str) -> None:
    (document,) = cb.Corpus([[{"from": speaker, "value": "hi", "weight": 1}]])
    assert document.messages == ({"role": role, "content": "hi", "weight": 1},)
    assert document.text == "hi"


@pytest.mark.parametrize("number", [np.int64(3), np.uint8(3), np.int32(3), 3])
def test_whole_numbers_of_every_kind_are_those_of_json(number) -> None:
    (document,) = cb.Corpus([[{"role": "user", "content": "hi", "turns": [number]}]])
    assert json.dumps(document.messages) == '[{"role": "user", "content": "hi", "turns": [3]}]'


def test_zipcal_in_parts_and_prefixes_read_memory(file: Path, llama: Path) -> None:
    common = {"tokenizer": llama, "strategy": "zipcal", "samples": 2, "length": 20, "parts": 2}
    assert cb.select(cb.Corpus(TEXTS), **common).sha256 == cb.select(file, **common).sha256
    options = {"strategy": "prefix", "samples": 2, "length": 12}
    assert (
        cb.generate(llama, corpus=cb.Corpus(TEXTS), **options).sha256
        == cb.generate(llama, corpus=file, **options).sha256
    )


def test_a_set_from_memory_is_made_again_from_the_same_texts(file: Path, llama: Path, tmp_path: Path) -> None:
    made = cb.select([cb.Corpus(TEXTS), file], tokenizer=llama, samples=4, length=30)
    made.save(tmp_path / "set")
    with pytest.raises(cb.CalibrantError, match="corpus in memory; pass the same texts with `corpora`"):
        cb.rebuild(tmp_path / "set")
    again = cb.rebuild(tmp_path / "set", corpora=[cb.Corpus(TEXTS), file])
    assert again.changes == []
    assert again.calibration.sha256 == made.sha256
    with pytest.raises(cb.CalibrantError, match="Changed: the corpus memory"):
        cb.rebuild(tmp_path / "set", corpora=[cb.Corpus(TEXTS[::-1]), file])


@pytest.mark.parametrize(("given", "said"), [
    ([], "empty"),
    (iter([]), "empty"),
    ({"train": ["a"]}, "got dict; choose one of its splits"),
    (3, "got int"),
    (b"text", "got bytes"),
    ([3], "document 0 in memory: neither a text nor a conversation, got int"),
    ([{"body": "a"}], r"no text under 'text' \(found: body\); name it with `field`"),
    (["\ud800"], "surrogate"),
    ({"a", "b"}, r"a set has another order in every process; give sorted\(texts\)"),
    (frozenset("ab"), "a frozenset has another order"),
    (Table(), r"a Table is iterated over by columns; give its texts as df\['text'\].tolist\(\) or its rows as"),
    ([cb.Document("a", "x"), cb.Document("a", "y")], "different ids"),
])  # fmt: skip
def test_what_is_no_corpus_is_refused(given, said: str) -> None:
    with pytest.raises(cb.CalibrantError, match=said):
        cb.Corpus(given)


def ids(rows: int = 6, length: int = 24) -> torch.Tensor:
    return torch.randint(4, 99, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("convert", [torch.Tensor.tolist, torch.Tensor.numpy, lambda t: t.to(torch.uint8), lambda t: t])
def test_ids_of_every_kind_give_one_set(convert, tmp_path: Path) -> None:
    mask = ids() % 3 > 0
    made = cb.CalibrationSet.from_tokens(convert(ids()), convert(mask))
    assert torch.equal(made.tokens, ids().int())
    assert torch.equal(made.mask, mask)
    manifest = made.manifest
    assert (manifest.strategy, manifest.samples, manifest.length, manifest.seed) == ("tokens", 6, 24, 0)
    made.save(tmp_path / "set")
    assert cb.CalibrationSet.load(tmp_path / "set").manifest == manifest
    assert bool(cb.CalibrationSet.from_tokens(ids()).mask.all())
    with pytest.raises(cb.CalibrantError, match="given token ids, which cannot be made again"):
        cb.rebuild(tmp_path / "set")


def test_batches_are_joined_and_padded_at_the_end() -> None:
    rows = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
    expected = cb.CalibrationSet.from_tokens(
        [[5, 6, 7, 0], [8, 9, 0, 0], [10, 11, 12, 13]], [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
    )
    padded_in_front = {
        "input_ids": torch.tensor([[5, 6, 7], [0, 8, 9]]),
        "attention_mask": torch.tensor([[1, 1, 1], [0, 1, 1]]),
        "labels": torch.tensor([[5, 6, 7], [-100, 8, 9]]),
    }
    for batches in (
        [padded_in_front, {"input_ids": [rows[2]]}],
        ({"input_ids": row} for row in rows),
        {"input_ids": rows},
        [torch.tensor(row) for row in rows],
    ):
        assert cb.CalibrationSet.from_tokens(batches).sha256 == expected.sha256


def test_a_data_loader_is_read() -> None:
    data = torch.utils.data.TensorDataset(ids())
    expected = cb.CalibrationSet.from_tokens(ids()).sha256
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    assert cb.CalibrationSet.from_tokens(loader).sha256 == expected
    assert cb.CalibrationSet.from_tokens(list(loader)).sha256 == expected
    dicts = torch.utils.data.DataLoader([{"input_ids": row} for row in ids()], batch_size=4)
    assert cb.CalibrationSet.from_tokens(dicts).sha256 == expected


@pytest.mark.parametrize(("given", "mask", "said"), [
    ([[1.0, 2.0]], None, "need to be integers, not float32"),
    (torch.ones(2, 3, dtype=torch.bool), None, "not bool"),
    ([["a", "b"]], None, "need to be integers"),
    ([[1, 2, 3], [4, 5]], None, "rows have 2 to 3 token ids: pad them"),
    ([[1, -2]], None, "range from -2 to 1"),
    ([[1, 1 << 40]], None, "range from"),
    ([1, 2], None, "dict of them, got int"),
    (torch.tensor([1, 2]), None, r"shape \[2\]"),
    ([[[1, 2]]], None, r"shape \[1, 1, 2\]"),
    ([], None, "two dimensions"),
    ([[1], [2]], None, "at least 1 row of 2"),
    ([[1, 2]], [[True]], r"a mask has shape \[1, 1\], its token ids have \[1, 2\]"),
    ([[1, 2]], [[0, 0]], "leaves no token"),
    ([torch.tensor([1, 2])], [[1, 1]], "leave out `mask`"),
    ([{"ids": [1, 2]}], None, r"found: ids"),
    ([{"input_ids": [[1, 2]], "attention_mask": [[1, 1], [1, 1]]}], None, "2 rows, its token ids have 1"),
    ([{"input_ids": [[1, 2]], "attention_mask": [[1]]}], None, r"a mask has shape \[1\]"),
    ("text", None, "got str"),
])  # fmt: skip
def test_what_is_no_set_of_tokens_is_refused(given, mask, said: str) -> None:
    with pytest.raises(cb.CalibrantError, match=said) as caught:
        cb.CalibrationSet.from_tokens(given, mask)
    assert "\n" not in str(caught.value)


def test_the_tokenizer_is_recorded_whatever_it_is_given_as(llama: Path) -> None:
    for tokenizer in (llama, str(llama), Tokenizer(llama), transformers.AutoTokenizer.from_pretrained(llama)):
        made = cb.CalibrationSet.from_tokens(ids(), tokenizer=tokenizer)
        assert made.manifest.tokenizer_sha256 == Tokenizer(llama).sha256
    assert cb.CalibrationSet.from_tokens(ids()).manifest.tokenizer_sha256 == ""


def test_given_tokens_compress_a_model(llama: Path, model_folder, tmp_path: Path) -> None:
    with_tokenizer = cb.CalibrationSet.from_tokens(ids(), tokenizer=llama)
    without = cb.CalibrationSet.from_tokens(np.asarray(ids()))
    for name, made in (("a", with_tokenizer), ("b", without)):
        assert cb.compress(llama, output=tmp_path / name, recipe="gptq-w4a16", calibration=made).layers
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]
    with pytest.raises(cb.CalibrantError, match=r"outside .* vocabulary of 128"):
        cb.compress(
            llama,
            output=tmp_path / "c",
            recipe="gptq-w4a16",
            calibration=cb.CalibrationSet.from_tokens(ids() + 64),
        )
