"""One selection from request to calibration set."""

from collections.abc import Callable, Sequence

import numpy as np

from calibrant.calibration.calibration_set import CalibrationSet
from calibrant.calibration.chat import assistant_mask
from calibrant.calibration.corpus import Corpus
from calibrant.calibration.document_stream import DocumentStream, encoded_batch, together
from calibrant.calibration.filters import Filter
from calibrant.calibration.filters.leakage import Leakage
from calibrant.calibration.selection.acdm import Acdm
from calibrant.calibration.selection.assemble import SelectedRows, assemble
from calibrant.calibration.selection.cola import Cola
from calibrant.calibration.selection.distributed import zipcal_in_parts
from calibrant.calibration.selection.embeddings import embedding_of
from calibrant.calibration.selection.filtering import filters_of
from calibrant.calibration.selection.mixing import counts_of_groups, groups_of
from calibrant.calibration.selection.model_scores import Scoring
from calibrant.calibration.selection.perplexity import PerplexitySelector
from calibrant.calibration.selection.request import OF_WORDS, WITH_DRAWS, SelectionRequest
from calibrant.calibration.selection.sampled import sampled_windows
from calibrant.calibration.selection.selector import Selector, cutting_of, select_windows
from calibrant.calibration.selection.spread import EmbeddingSelector, herding, k_centre
from calibrant.calibration.selection.uniform import uniform_windows
from calibrant.calibration.selection.unigram import unigram_rows, words_dataset_rows
from calibrant.calibration.selection.zipcal import ZipCal
from calibrant.calibration.selection.zipf_score import ZipfScore
from calibrant.calibration.windows import TokenizedDocument, Window
from calibrant.errors import CalibrantError
from calibrant.executors import Executor
from calibrant.modeling.tokenizer import Tokenizer
from calibrant.progress import Progress
from calibrant.randomness import make_rng

# Strategies that run the model over every candidate.
WITH_MODEL = ("perplexity", "cola", "acdm")


def select_from(
    corpora: Sequence[Corpus],
    model: str,
    request: SelectionRequest,
    scoring: Scoring,
    executor: Executor,
    progress: Progress,
) -> CalibrationSet:
    """Run ``request`` on one or several corpora with the tokenizer in ``model``, a folder.

    ``scoring`` is for strategies that score with a model; ``executor`` runs the parts of "zipcal".

    Several corpora share the samples by ``request.weights``, by default equally; their rows follow one another, and the
    documents' ids in the manifest begin with the corpus's number.

    Raises:
        CalibrantError: a corpus cannot be read, is empty or too small.
    """
    tokenizer = Tokenizer(model)
    asked, request = request, request.model_copy(update={"length": request.length - len(tokenizer.prefix)})
    if request.parts > 1:
        results = [
            zipcal_in_parts(corpus, model, share, executor, progress)
            for corpus, share in zip(corpora, _shared(request, request.weights, len(corpora)), strict=True)
        ]
        parts = [
            SelectedRows(
                [window.tokens for window in one.windows],
                [window.segments for window in one.windows],
                one.counts,
                findings=one.findings,
            )
            for one in results
        ]
        return _assembled(corpora, parts, asked, tokenizer, progress)
    # Shared, so that duplicates are found across corpora.
    filters = filters_of(request, progress)
    if request.strategy == "zipcal-multi":
        parts = _multi_domain(corpora, tokenizer, request, filters, scoring, progress)
        return _assembled(corpora, parts, asked, tokenizer, progress)
    parts = [
        _select_mix(corpus, tokenizer, share, filters, scoring, progress) if share.samples else SelectedRows([], [], {})
        for corpus, share in zip(corpora, _shared(request, request.weights, len(corpora)), strict=True)
    ]
    return _assembled(corpora, parts, asked, tokenizer, progress)


def _assembled(
    corpora: Sequence[Corpus],
    parts: Sequence[SelectedRows],
    request: SelectionRequest,
    tokenizer: Tokenizer,
    progress: Progress,
) -> CalibrationSet:
    for note in dict.fromkeys(note for part in parts for note in part.findings.notes):
        progress.note(note)
    return assemble(corpora, parts, request, tokenizer)


def _shared(request: SelectionRequest, weights: tuple[float, ...] | None, count: int) -> list[SelectionRequest]:
    """``request`` with the samples and the stride of each of ``count`` corpora or groups."""
    samples = _shares(request.samples, weights, count)
    strides = _shares(request.rows_between_draws, weights, count)
    # Largest remainders may give a part fewer rows of a larger total; its draws must not overlap.
    return [
        request.model_copy(update={"samples": own, "stride": max(own, stride)})
        for own, stride in zip(samples, strides, strict=True)
    ]


def _shares(samples: int, weights: tuple[float, ...] | None, count: int) -> list[int]:
    """``samples`` split in proportion to ``weights``, by largest remainder."""
    if weights is not None and len(weights) != count:
        raise CalibrantError(f"{len(weights)} weights for {count} corpora; give one for each")
    given = np.array(weights if weights is not None else [1.0] * count)
    exact = samples * given / given.sum()
    shares = np.floor(exact).astype(int)
    for index in np.argsort(shares - exact, kind="stable")[: samples - int(shares.sum())]:
        shares[index] += 1
    return [int(share) for share in shares]


def _select_mix(
    corpus: Corpus,
    tokenizer: Tokenizer,
    request: SelectionRequest,
    filters: list[Filter],
    scoring: Scoring,
    progress: Progress,
) -> SelectedRows:
    """Rows from all documents of the corpus, or from one group of its documents after the other."""
    groups = groups_of(request.mix)
    if not groups:
        return _select(corpus, tokenizer, request, filters, scoring, progress)
    parts: list[tuple[str, SelectedRows]] = []
    for (name, group), share in zip(groups, _shared(request, request.mix.weights, len(groups)), strict=True):
        if share.samples:
            try:
                parts.append((name, _select(corpus, tokenizer, share, [group, *filters], scoring, progress)))
            except CalibrantError as error:
                raise CalibrantError(f"{name.replace('_', ' ')}: {error}") from error
    return SelectedRows(
        [row for _, part in parts for row in part.rows],
        [segments for _, part in parts for segments in part.segments],
        counts_of_groups([(name, len(part.rows), part.counts) for name, part in parts]),
        [mask for _, part in parts for mask in part.masks or []] or None,
        together(part.findings for _, part in parts),
    )


def _select(
    corpus: Corpus,
    tokenizer: Tokenizer,
    request: SelectionRequest,
    filters: list[Filter],
    scoring: Scoring,
    progress: Progress,
) -> SelectedRows:
    leaked_before = sum(one.leaked for one in filters if isinstance(one, Leakage))
    drawn = request.strategy in WITH_DRAWS
    shard = 0 if drawn else request.draw
    stream = DocumentStream(corpus, filters, make_rng(request.seed, "shard"), shard, request.shards)
    offsets = make_rng(request.seed, "offset")
    samples, draw, stride = request.samples, request.draw, request.rows_between_draws
    windows: list[Window] = []
    rows: list[list[int]] = []
    if request.strategy in OF_WORDS:
        rng = make_rng(request.seed, request.strategy)
        draw_words = unigram_rows if request.strategy == "unigram" else words_dataset_rows
        rows = draw_words(stream, tokenizer, samples, request.length, draw, stride, rng, progress)
    elif request.strategy == "uniform":
        rng = make_rng(request.seed, "shuffle")
        cutting = cutting_of(request, tokenizer)
        windows = uniform_windows(stream, tokenizer, cutting, samples, draw, stride, rng, offsets, progress)
        if request.seed and request.windows == "pack" and stream.counts["documents"] == 1:
            progress.note(
                f"{corpus.location} is one document, so every seed gives the same rows: use other draws, or a "
                "corpus of many documents (JSON Lines)"
            )
    else:
        selector = _selector(request, tokenizer, scoring, progress)
        cutting = cutting_of(request, tokenizer)
        windows = select_windows(stream, tokenizer, cutting, selector, samples, offsets, progress)
    counts = dict(stream.counts)
    for filter_ in filters:
        if isinstance(filter_, Leakage):
            counts["documents_with_leakage"] = filter_.leaked - leaked_before
            counts["evaluation_texts_too_short"] = filter_.too_short
    masks = _assistant_masks(stream, tokenizer, windows) if request.mask == "assistant" else None
    rows = rows or [window.tokens for window in windows]
    return SelectedRows(rows, [window.segments for window in windows], counts, masks, stream.findings)


def _assistant_masks(stream: DocumentStream, tokenizer: Tokenizer, windows: list[Window]) -> list[list[bool]]:
    """Which tokens of the chosen windows an assistant wrote; reads the corpus once more."""
    named = {segment.document for window in windows for segment in window.segments}
    documents = [document for document in stream.corpus if document.id in named]
    by_name = {
        document.id: assistant_mask(document, encoded.tokens, tokenizer)
        for document, encoded in zip(documents, encoded_batch(list(enumerate(documents)), tokenizer), strict=True)
        if isinstance(encoded, TokenizedDocument)
    }
    masks = []
    for window in windows:
        mask = [False] * len(window.tokens)
        for part in window.segments:
            own = by_name[part.document][part.offset : part.offset + part.length]
            mask[part.start : part.start + part.length] = own
        masks.append(mask)
    return masks


def _selector(request: SelectionRequest, tokenizer: Tokenizer, scoring: Scoring, progress: Progress) -> Selector:
    rng = make_rng(request.seed, request.strategy, request.draw)
    if request.strategy == "zipcal":
        return ZipCal(tokenizer, request.pool, rng)
    if request.strategy == "zipf":
        return ZipfScore(tokenizer)
    if request.strategy == "perplexity":
        return PerplexitySelector(scoring, tokenizer.prefix, request.keep, request.percentile, rng)
    if request.strategy == "cola":
        return Cola(scoring, tokenizer.prefix, rng)
    if request.strategy == "acdm":
        targets = [Corpus(location, request.target_field) for location in request.targets]
        sampled = [sampled_windows(target, tokenizer, request.seed, progress) for target in targets]
        return Acdm(scoring, tokenizer.prefix, sampled)
    embedding = embedding_of(request.embedding, tokenizer, request.seed)
    if request.strategy == "herding":
        return EmbeddingSelector(embedding, herding)
    return EmbeddingSelector(embedding, _k_centre_from(rng))


def _k_centre_from(rng: np.random.Generator) -> Callable[[np.ndarray, int], list[int]]:
    """k-centre with a random first centre."""
    return lambda vectors, count: k_centre(vectors, count, int(rng.integers(len(vectors))))[0]


def _multi_domain(
    corpora: Sequence[Corpus],
    tokenizer: Tokenizer,
    request: SelectionRequest,
    filters: list[Filter],
    scoring: Scoring,
    progress: Progress,
) -> list[SelectedRows]:
    """ZipCal in every corpus, then k-centre over the embeddings of its choices (arXiv 2603.16105, algorithm 2)."""
    single = request.model_copy(update={"strategy": "zipcal"})
    parts = [_select(corpus, tokenizer, single, filters, scoring, progress) for corpus in corpora]
    pooled = [(number, row) for number, part in enumerate(parts) for row in range(len(part.rows))]
    embedding = embedding_of(request.embedding, tokenizer, request.seed)
    embedding.see([Window(parts[number].rows[row], [], 0, 0, 0) for number, row in pooled])
    rng = make_rng(request.seed, request.strategy, request.draw)
    chosen = sorted(_k_centre_from(rng)(embedding.vectors(), request.samples))
    kept: list[list[int]] = [[] for _ in parts]
    for index in chosen:
        number, row = pooled[index]
        kept[number].append(row)
    return [
        SelectedRows(
            [part.rows[row] for row in rows],
            [part.segments[row] for row in rows],
            part.counts,
            findings=part.findings,
        )
        for part, rows in zip(parts, kept, strict=True)
    ]
