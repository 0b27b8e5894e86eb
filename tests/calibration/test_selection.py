"""Selections end to end on a small corpus: sizes, determinism, what each strategy prefers, and making a set again."""

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import calibrant as cb
from calibrant.calibration.calibration_set import CalibrationSet
from calibrant.calibration.selection.request import filter_request, mix_request
from calibrant.calibration.selection.zipcal import subword_classes
from calibrant.calibration.windows import Cutting, TokenizedDocument
from calibrant.errors import CalibrantError
from calibrant.modeling.tokenizer import Tokenizer
from calibrant.progress import NoProgress
from calibrant.report.inspection import inspect_sets

WORDS = ["unigram", "words_dataset"]
STRATEGIES = ["uniform", "zipcal", "zipf", *WORDS, "perplexity", "k-centre", "herding", "cola", "zipcal-multi"]


def write_corpus(path: Path, texts: list[str]) -> Path:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    path.write_bytes(gzip.compress(lines.encode(), mtime=0) if path.suffix == ".gz" else lines.encode())
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz    "))
    return write_corpus(
        tmp_path / "c.jsonl.gz", ["".join(rng.choice(letters, rng.integers(5, 200))) + "." for _ in range(60)]
    )


documents = st.lists(st.lists(st.integers(0, 9), max_size=12), min_size=1, max_size=12)


@settings(max_examples=200, deadline=None)
@given(documents, st.integers(1, 9), st.sampled_from(["pack", "window", "document"]), st.integers(0, 3))
def test_windows_are_cut_again_alike(texts: list[list[int]], length: int, policy, seed: int) -> None:
    """Every window comes out the same from its own documents; packed windows are the stream, segments say the truth."""
    tokenized = [TokenizedDocument(2 * i, f"d{i}", tokens) for i, tokens in enumerate(texts)]
    counts = {"documents_used": 0, "documents_too_short": 0}
    cutting = Cutting(policy, length, separator=99)
    cut = list(cutting.windows(tokenized, np.random.default_rng(seed), counts))
    for window in cut:
        own = [document for document in tokenized if window.first <= document.ordinal <= window.last]
        assert cutting.again(window.begin, own) == window
        for segment in window.segments:
            source = texts[int(segment.document[1:])][segment.offset : segment.offset + segment.length]
            assert window.tokens[segment.start : segment.start + segment.length] == source
    if policy == "pack":
        stream = [token for tokens in texts for token in [*tokens, 99]]
        assert [window.tokens for window in cut] == [
            stream[i : i + length] for i in range(0, len(stream) - length + 1, length)
        ]
    if policy == "document":
        assert [window.tokens for window in cut] == [tokens[:length] for tokens in texts if tokens]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_makes_a_set_that_can_be_made_again(corpus: Path, llama: Path, tmp_path: Path, strategy) -> None:
    made = cb.select(corpus, tokenizer=llama, strategy=strategy, samples=6, length=40, seed=3)
    assert made.tokens.shape == (6, 40)
    assert made.mask.all() or strategy == "words_dataset"
    again = cb.select(corpus, tokenizer=llama, strategy=strategy, samples=6, length=40, seed=3)
    made.save(tmp_path / "a")
    again.save(tmp_path / "b")
    rebuilt = cb.rebuild(tmp_path / "a")
    assert rebuilt.changes == []
    rebuilt.calibration.save(tmp_path / "c")
    for name in ("tokens.safetensors", "manifest.json"):
        contents = {(tmp_path / folder / name).read_bytes() for folder in "abc"}
        assert len(contents) == 1
    if strategy not in WORDS:
        starts = {(row[0].document, row[0].offset) for row in made.manifest.rows}
        assert len(starts) == 6


def test_another_name_of_a_strategy_makes_the_same_set(corpus: Path, llama: Path) -> None:
    common = {"tokenizer": llama, "samples": 4, "length": 30}
    ours, theirs = (cb.select(corpus, strategy=name, **common) for name in ("k-centre", "k-center"))
    assert theirs.manifest == ours.manifest
    assert theirs.manifest.strategy == "k-centre"


@pytest.mark.parametrize("strategy", ["zipcal", "herding"])
def test_draws_of_a_strategy_without_chance_see_disjoint_parts(corpus: Path, llama: Path, strategy) -> None:
    with pytest.raises(CalibrantError, match="needs `shards=2`"):
        cb.select(corpus, tokenizer=llama, strategy=strategy, samples=3, length=40, draw=1)
    draws = [
        cb.select(corpus, tokenizer=llama, strategy=strategy, samples=3, length=40, draw=k, shards=3) for k in range(3)
    ]
    used = [{segment.document for row in draw.manifest.rows for segment in row} for draw in draws]
    assert len(used[0] | used[1] | used[2]) == sum(map(len, used))


def test_zipcal_covers_more_than_chance_and_says_how_much(corpus: Path, llama: Path) -> None:
    table = subword_classes(Tokenizer(llama))

    def covered(made: cb.CalibrationSet) -> int:
        return len(np.unique(table[made.tokens.numpy()])) - (table[made.tokens.numpy()] < 0).any()

    chosen = cb.select(corpus, tokenizer=llama, strategy="zipcal", samples=3, length=30)
    pooled = cb.select(corpus, tokenizer=llama, strategy="zipcal", samples=3, length=30, pool=5)
    random = cb.select(corpus, tokenizer=llama, samples=3, length=30)
    assert covered(chosen) >= covered(random)
    assert chosen.manifest.counts["classes_covered"] == covered(chosen) >= pooled.manifest.counts["classes_covered"]


def test_classes_join_what_differs_in_case_only(llama: Path) -> None:
    tokenizer = Tokenizer(llama)
    table, ids = subword_classes(tokenizer), tokenizer.hf.get_vocab()
    assert table[ids["a"]] == table[ids["A"]] != table[ids["b"]]
    assert table[ids[" "]] == table[ids["<s>"]] == -1


def test_zipf_prefers_rare_words(tmp_path: Path, llama: Path) -> None:
    texts = ["the cat sat on the mat"] * 9 + ["quixotic jabberwocky zephyrs"]
    path = write_corpus(tmp_path / "z.jsonl", texts)
    made = cb.select(path, tokenizer=llama, strategy="zipf", samples=1, length=64, windows="document")
    assert made.manifest.rows[0][0].document == "z.jsonl:10"
    assert int(made.mask.sum()) == len(texts[-1])
    assert (made.tokens[~made.mask] == 2).all()


def test_perplexity_bands_lie_in_order(corpus: Path, llama: Path) -> None:
    from calibrant.modeling.checkpoint import ModelFolder
    from calibrant.modeling.losses import row_losses
    from calibrant.modeling.whole_model import load_whole

    model = load_whole(ModelFolder(llama), "cpu", "float32")

    def loss(made: cb.CalibrationSet) -> np.ndarray:
        return np.array(row_losses(model, made.tokens, made.mask))

    common = {"tokenizer": llama, "strategy": "perplexity", "samples": 5, "length": 40, "dtype": "float32"}
    lowest, middle = (cb.select(corpus, keep=keep, **common) for keep in ("lowest", "middle"))
    below = cb.select(corpus, percentile=50, **common)
    assert loss(lowest).max() < loss(middle).min()
    everything = cb.select(corpus, **{**common, "keep": "lowest", "samples": below.manifest.counts["candidates"]})
    assert (loss(below) < np.percentile(loss(everything), 50)).all()
    with pytest.raises(CalibrantError, match="raise `percentile`"):
        cb.select(corpus, percentile=1, **common)


def test_losses_match_a_plain_computation(llama: Path) -> None:
    from calibrant.modeling.checkpoint import ModelFolder
    from calibrant.modeling.losses import row_losses
    from calibrant.modeling.whole_model import load_whole

    model = load_whole(ModelFolder(llama), "cpu", "float32")
    tokens = torch.randint(4, 90, (3, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1, 12:] = False
    mask[2, 1:] = False
    losses = row_losses(model, tokens, mask)
    for row, end in ((0, 20), (1, 12)):
        expected = model(input_ids=tokens[row : row + 1, :end], labels=tokens[row : row + 1, :end]).loss
        assert losses[row] == pytest.approx(expected.item(), rel=1e-4)
    assert np.isnan(losses[2])


def test_unigram_rows_are_the_words_of_the_corpus(tmp_path: Path, llama: Path) -> None:
    path = write_corpus(tmp_path / "u.jsonl", ["Alpha beta", "beta gamma gamma"] * 20)
    made = cb.select(path, tokenizer=llama, strategy="unigram", samples=2, length=30)
    text = Tokenizer(llama).decode(made.tokens.flatten().tolist())
    assert set(text.split()[1:-1]) == {"alpha", "beta", "gamma"}
    other = cb.select(path, tokenizer=llama, strategy="unigram", samples=2, length=30, draw=1, stride=2)
    together = cb.select(path, tokenizer=llama, strategy="unigram", samples=4, length=30)
    assert torch.equal(torch.cat([made.tokens, other.tokens]), together.tokens)
    with pytest.raises(CalibrantError, match="100 words give 5"):
        cb.select(path, tokenizer=llama, strategy="unigram", samples=100, length=30)


def test_words_dataset_rows_are_as_many_words_as_tokens_cut_at_the_end(tmp_path: Path, llama: Path) -> None:
    """As the released code of ZipCal: words of beginnings, 128 a row, joined by spaces, the row's first 128 tokens."""
    texts = [f"Alpha{'b' * (i % 4)} beta gamma " * 3 + "never" * 60 for i in range(400)]
    path = write_corpus(tmp_path / "w.jsonl", texts)
    tokenizer = Tokenizer(llama)
    made = cb.select(path, tokenizer=llama, strategy="words_dataset", samples=4, length=24)
    beginnings = [tokenizer.decode(tokenizer.encode(text)[:24]).lower().split() for text in texts]
    pool = [word for words in beginnings for word in words]
    assert made.manifest.counts["words"] == len(pool)
    for row in made.tokens.tolist():
        words = tokenizer.decode(row).split(" ")
        assert set(words[:-1]) <= set(pool)  # the last one is cut
        assert row == tokenizer.encode(" ".join(words))
    assert cb.select(path, tokenizer=llama, strategy="words_dataset", samples=2).tokens.shape == (2, 128)
    with pytest.raises(CalibrantError, match=r"beginnings of its documents have \d+ words, 256000 are needed"):
        cb.select(path, tokenizer=llama, strategy="words_dataset", samples=2000)


def test_words_dataset_draws_take_the_words_once(tmp_path: Path, llama: Path) -> None:
    words = [chr(ord("A") + i % 26) + chr(ord("a") + i // 26) for i in range(6 * 12)]
    path = write_corpus(tmp_path / "o.jsonl", [" ".join(words[i : i + 4]) for i in range(0, len(words), 4)])
    common = {"tokenizer": llama, "strategy": "words_dataset", "samples": 2, "length": 12}
    draws = [cb.select(path, draw=k, stride=2, **common) for k in range(3)]
    found = [word for draw in draws for row in draw.tokens.tolist() for word in Tokenizer(llama).decode(row).split()]
    assert len(found) == len(set(found)) == 24
    assert set(found) <= {word.lower() for word in words}
    with pytest.raises(CalibrantError, match="use a smaller `stride`, fewer samples"):
        cb.select(path, draw=1, **common)


def test_several_corpora_share_the_samples(tmp_path: Path, llama: Path) -> None:
    first = write_corpus(tmp_path / "a.jsonl", ["aaaa bbbb cccc"] * 30)
    second = write_corpus(tmp_path / "b.jsonl", ["xxxx yyyy zzzz"] * 30)
    made = cb.select([first, second], tokenizer=llama, samples=8, length=20, weights=[3, 1])
    owners = [row[0].document[0] for row in made.manifest.rows]
    assert owners == ["0"] * 6 + ["1"] * 2
    assert [part["rows"] for part in made.manifest.corpora] == [6, 2]
    multi = cb.select([first, second], tokenizer=llama, strategy="zipcal-multi", samples=4, length=20)
    assert {row[0].document[0] for row in multi.manifest.rows} == {"0", "1"}
    with pytest.raises(CalibrantError, match="2 corpora"):
        cb.select([first, second], tokenizer=llama, samples=8, length=20, weights=[1])


def test_a_changed_corpus_is_named(tmp_path: Path, corpus: Path, llama: Path) -> None:
    made = cb.select(corpus, tokenizer=llama, strategy="zipcal", samples=4, length=40)
    made.save(tmp_path / "set")
    moved = corpus.rename(tmp_path / "moved.jsonl.gz")
    with pytest.raises(CalibrantError, match=r"c\.jsonl\.gz"):
        cb.rebuild(tmp_path / "set")
    again = cb.rebuild(tmp_path / "set" / "manifest.json", corpora=[moved])
    assert again.calibration.sha256 == made.sha256
    write_corpus(moved, ["something else entirely. " * 30] * 30)
    with pytest.raises(CalibrantError, match=r"Changed: the corpus file c\.jsonl\.gz"):
        cb.rebuild(tmp_path / "set", corpora=[moved])


@pytest.mark.parametrize("strategy", ["self", "vocabulary"])
def test_generated_sets_can_be_made_again(tmp_path: Path, llama: Path, strategy: str) -> None:
    made = cb.generate(llama, strategy=strategy, samples=3, length=20, seed=4, draw=2)
    made.save(tmp_path / "set")
    again = cb.rebuild(tmp_path / "set")
    again.calibration.save(tmp_path / "again")
    assert (tmp_path / "again/manifest.json").read_bytes() == (tmp_path / "set/manifest.json").read_bytes()


@pytest.mark.parametrize(("options", "said"), [
    ({"strategy": "nonsense"}, "strategy 'nonsense'"),
    ({"pool": 5}, "pool is for zipcal"),
    ({"strategy": "zipcal", "pool": 0}, "pool 0"),
    ({"percentile": 20.0}, "percentile is for perplexity"),
    ({"windows": "slices"}, "windows 'slices'"),
    ({"samples": 10_000}, "only 1"),
    ({"strategy": "zipcal", "samples": 10_000}, "10000 are needed"),
    ({"shards": 2}, "leave out `shards`"),
    ({"stride": 2}, "would overlap: use `stride=3` or more"),
    ({"strategy": "zipcal", "stride": 128}, "stride is for uniform, unigram and words_dataset only"),
    ({"weights": [float("inf")]}, "finite"),
    ({"weights": []}, "finite"),
    ({"strategy": "zipcal-multi", "weights": [1]}, "leave out `weights`"),
    ({"strategy": "herding", "embedding": "nowhere"}, "sentence"),
])  # fmt: skip
def test_options_that_do_not_fit(corpus: Path, llama: Path, options, said: str) -> None:
    with pytest.raises(CalibrantError, match=said):
        cb.select(corpus, tokenizer=llama, **{"samples": 3, "length": 40, **options})


CYRILLIC = str.maketrans("abcdefghijklmnopqrstuvwxyz", "абвгдежзийклмнопрстуфхцчшщ")


def test_a_mix_shares_the_rows_between_scripts(llama: Path, corpus: Path, tmp_path: Path) -> None:
    texts = [json.loads(line)["text"] for line in gzip.decompress(corpus.read_bytes()).decode().splitlines()]
    both = write_corpus(tmp_path / "both.jsonl", [t for text in texts for t in (text, text.translate(CYRILLIC))])
    mix = cb.MixRequest(scripts=("latin", "cyrillic"), weights=(1, 3))
    made = cb.select(both, tokenizer=llama, samples=8, length=16, mix=mix, strategy="zipcal")
    counts = made.manifest.counts
    assert (counts["rows_latin"], counts["rows_cyrillic"], counts["documents"]) == (2, 6, 120)
    for row, segments in enumerate(made.manifest.rows):
        odd_lines = {int(segment.document.rpartition(":")[2]) % 2 for segment in segments}
        assert odd_lines == ({1} if row < 2 else {0})
    made.save(tmp_path / "set")
    assert cb.rebuild(tmp_path / "set").calibration.sha256 == made.sha256


def test_a_mix_shares_the_rows_between_lengths(llama: Path, corpus: Path) -> None:
    mix = cb.MixRequest(lengths=(50, 120))
    made = cb.select(corpus, tokenizer=llama, samples=9, length=8, mix=mix, windows="document")
    lengths = {document.id: len(document.text) for document in cb.Corpus(corpus)}
    groups = [np.digitize(lengths[segments[0].document], (50, 120)) for segments in made.manifest.rows]
    assert groups == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    again = cb.select(corpus, tokenizer=llama, samples=9, length=8, mix=mix, windows="document", draw=1, stride=9)
    documents = [{s.document for row in one.manifest.rows for s in row} for one in (made, again)]
    assert not documents[0] & documents[1]


def test_what_a_mix_needs(llama: Path, corpus: Path) -> None:
    with pytest.raises(CalibrantError, match=r"cyrillic: .* no document is left"):
        cb.select(corpus, tokenizer=llama, samples=4, length=8, mix=cb.MixRequest(scripts=("latin", "cyrillic")))
    for options, said in (
        ({"scripts": ["latin"], "lengths": [5]}, "not both"),
        ({"lengths": [9, 5]}, "rising order"),
        ({"scripts": ["latin"], "weights": [1, 2]}, "2 weights for the 1 groups"),
        ({"weights": [1]}, "need scripts or lengths"),
        ({"scripts": ["latin"], "weights": [-1]}, "not negative"),
    ):
        with pytest.raises(CalibrantError, match=said):
            mix_request(**options)
    with pytest.raises(CalibrantError, match="cyrilic: no script of that name; did you mean cyrillic"):
        mix_request(scripts=["latin", "cyrilic"])


def test_duplicates_are_known_across_corpora(llama: Path, corpus: Path) -> None:
    made = cb.select(
        [corpus, corpus],
        tokenizer=llama,
        samples=4,
        length=8,
        windows="document",
        weights=[1, 0],
        filters=cb.FilterRequest(duplicates="exact"),
    )
    assert len(made.tokens) == 4
    with pytest.raises(CalibrantError, match="no document is left"):
        cb.select(
            [corpus, corpus],
            tokenizer=llama,
            samples=4,
            length=8,
            filters=cb.FilterRequest(duplicates="exact"),
        )


def test_covered_classes_are_those_of_the_set(llama: Path, corpus: Path, tmp_path: Path) -> None:
    other = write_corpus(tmp_path / "other.jsonl", [f"{i * i} {i} {7 * i}" for i in range(40)])
    options = {"tokenizer": llama, "samples": 4, "length": 16}
    classes = subword_classes(Tokenizer(llama))
    for strategy in ("zipcal", "zipcal-multi"):
        made = cb.select([corpus, other], strategy=strategy, **options)
        found = classes[np.unique(made.tokens.numpy())]
        assert made.manifest.counts["classes_covered"] == len(np.unique(found[found >= 0]))
        assert made.manifest.counts["classes"] == classes.max() + 1


def test_rebuild_sees_what_was_looked_for_as_leakage(llama: Path, corpus: Path, tmp_path: Path) -> None:
    texts = [json.loads(line)["text"] for line in gzip.decompress(corpus.read_bytes()).decode().splitlines()]
    leaked = write_corpus(tmp_path / "leaked.jsonl", [max(texts, key=lambda text: len(text.split()))])
    filters = cb.FilterRequest(leakage=(str(leaked),), leakage_run=5)
    cb.select(corpus, tokenizer=llama, samples=4, length=16, strategy="zipcal", filters=filters).save(tmp_path / "set")
    moved = leaked.rename(tmp_path / "moved.jsonl")
    with pytest.raises(CalibrantError, match=r"its leakage .* is not there .*`leakage`"):
        cb.rebuild(tmp_path / "set")
    assert cb.rebuild(tmp_path / "set", leakage=[moved]).changes == []
    write_corpus(moved, [*texts])
    with pytest.raises(CalibrantError, match=r"no document is left|Changed: the leakage file"):
        cb.rebuild(tmp_path / "set", leakage=[moved])


def test_options_without_effect_are_refused(llama: Path, corpus: Path) -> None:
    filters = {"leakage_run": 5}, {"keep_leaked": True}, {"min_characters": 9, "max_characters": 5}, {"script": "latn"}
    for options in filters:
        with pytest.raises(CalibrantError):
            filter_request(**options)
    schedule = cb.TemperatureSchedule(0.5, 0.5, 0)
    for options in (
        {"strategy": "vocabulary", "temperature": schedule},
        {"strategy": "llm-qat", "first_tokens": "english"},
        {"strategy": "self", "percentile": 50},
        {"strategy": "prefix"},
    ):
        with pytest.raises(CalibrantError):
            cb.generate(llama, samples=2, length=8, **options)
    with pytest.raises(CalibrantError, match='`executor="ray"` runs the parts of zipcal; uniform runs here'):
        cb.select(corpus, tokenizer=llama, samples=2, length=8, executor="ray")
    with pytest.raises(CalibrantError, match="percentile goes with keep below"):
        cb.select(corpus, tokenizer=llama, samples=2, length=8, strategy="perplexity", keep="lowest", percentile=50)


def test_scores_of_corpora_are_the_papers(llama: Path, corpus: Path, tmp_path: Path) -> None:
    """Against the formula on whole small corpora, and a corpus fits itself best."""
    other = write_corpus(tmp_path / "digits.jsonl", [f"{i * i} {i} {7 * i}" for i in range(40)])
    third = write_corpus(tmp_path / "third.jsonl", ["some words are here", "and 12 others"])
    scores = cb.score_corpora([other, third, corpus], [corpus, third], weights=[3, 1], tokenizer=llama)
    assert [scores[0].corpus, scores[-1].corpus] == [str(corpus), str(other)]
    tokenizer = Tokenizer(llama)
    texts = {str(path): [document.text for document in cb.Corpus(path)] for path in (other, third, corpus)}
    ids = {name: np.concatenate([tokenizer.encode(text) for text in of]) for name, of in texts.items()}
    for one in scores:
        expected = 0.0
        for target, weight in ((str(corpus), 0.75), (str(third), 0.25)):
            types = np.union1d(ids[one.corpus], ids[target])
            p, q = ((ids[n][:, None] == types).sum(axis=0) / len(ids[n]) + 1e-10 for n in (one.corpus, target))
            p, q = p / p.sum(), q / q.sum()
            expected += weight * float((p * np.log(p / q)).sum() + (q * np.log(q / p)).sum()) / 2
        assert one.divergence == pytest.approx(expected, rel=1e-6)
    assert scores[0].similarity > scores[-1].similarity
    with pytest.raises(CalibrantError, match="one for each of the 1 targets"):
        cb.score_corpora([other], [corpus], weights=[1, 2], tokenizer=llama)


@pytest.fixture
def beginning_model(llama: Path, tmp_path: Path) -> Path:
    """The tiny model with a tokenizer that begins every text with BOS."""
    folder = shutil.copytree(llama, tmp_path / "beginning")
    definition = json.loads((folder / "tokenizer.json").read_text())
    definition["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    return folder


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rows_begin_as_the_tokenizer_begins_texts(
    corpus: Path, beginning_model: Path, tmp_path: Path, strategy
) -> None:
    made = cb.select(corpus, tokenizer=beginning_model, samples=4, length=16, strategy=strategy)
    assert (made.tokens[:, 0] == 1).all()
    assert (made.tokens[:, 1:] != 1).all()
    assert made.mask[:, 0].all()
    texts = {document.id: Tokenizer(beginning_model).encode(document.text) for document in cb.Corpus(corpus)}
    for row, segments in zip(made.tokens.tolist(), made.manifest.rows, strict=False):
        for one in segments:
            source = texts[one.document.removeprefix("0/")][one.offset : one.offset + one.length]
            assert row[one.start : one.start + one.length] == source
    made.save(tmp_path / "set")
    assert cb.rebuild(tmp_path / "set").calibration.sha256 == made.sha256


def test_perplexities_are_those_behind_the_beginning(corpus: Path, beginning_model: Path, tmp_path: Path) -> None:
    made = cb.select(corpus, tokenizer=beginning_model, samples=4, length=16)
    made.save(tmp_path / "with")
    bare = CalibrationSet.build(made.tokens[:, 1:], made.mask[:, 1:], made.manifest.model_copy(update={"length": 15}))
    bare.save(tmp_path / "without")
    found = inspect_sets([tmp_path / "with", tmp_path / "without"], model=beginning_model, perplexity=True)
    assert found.sets[0].statistics.numbers["perplexity"] == found.sets[1].statistics.numbers["perplexity"]


class _Notes(NoProgress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_a_seed_that_can_shuffle_nothing_is_said_so(corpus: Path, llama: Path, tmp_path: Path) -> None:
    one = tmp_path / "one.txt"
    one.write_text("some words and others. " * 200)
    for source, seed, said in ((one, 1, True), (one, 0, False), (corpus, 1, False)):
        listener = _Notes()
        cb.select(source, tokenizer=llama, samples=2, length=16, seed=seed, progress=listener)
        assert any("is one document, so every seed" in note for note in listener.notes) == said
    first, second = (cb.select(one, tokenizer=llama, samples=2, length=16, seed=seed) for seed in (0, 1))
    other = cb.select(one, tokenizer=llama, samples=2, length=16, draw=1, stride=2)
    assert torch.equal(first.tokens, second.tokens)
    assert not torch.equal(first.tokens, other.tokens)


def test_short_texts_are_told_how_to_become_rows(tmp_path: Path, llama: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({"text": f"Why is {number} odd?"}) + "\n" for number in range(9)))
    with pytest.raises(cb.CalibrantError, match=r"`windows=\"document\"` \(a shorter row for each\)"):
        cb.select(path, tokenizer=llama, strategy="zipcal", samples=8, length=60)
    with pytest.raises(cb.CalibrantError, match=r"use `windows=\"pack\"`, `windows=\"document\"` \(a shorter row"):
        cb.select(path, tokenizer=llama, strategy="zipcal", windows="window", samples=8, length=60)
    made = cb.select(path, tokenizer=llama, strategy="zipcal", windows="document", samples=8, length=60)
    assert made.tokens.shape[0] == 8
