"""Selected rows put together: tensors, the documents behind them, counts and the manifest."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from calibrant.calibration.calibration_set import EMPTY_ROWS, CalibrationSet, Manifest, Segment
from calibrant.calibration.corpus import Corpus, corpus_record
from calibrant.calibration.document_stream import Findings
from calibrant.calibration.selection.embeddings import embedding_sha256
from calibrant.calibration.selection.request import OF_WORDS, SelectionRequest
from calibrant.calibration.selection.zipcal import subword_classes
from calibrant.errors import CalibrantError
from calibrant.modeling.chat_template import DATE
from calibrant.modeling.tokenizer import Tokenizer


@dataclass(frozen=True)
class SelectedRows:
    """Rows selected from one corpus.

    ``rows`` have at most ``length`` token ids; ``segments`` says where each row comes from, and is empty for rows
    without a source document. ``masks`` says which tokens of each row count, None if all do.
    """

    rows: list[list[int]]
    segments: list[list[Segment]]
    counts: dict[str, int]
    masks: list[list[bool]] | None = None
    findings: Findings = field(default_factory=Findings)


def assemble(
    corpora: Sequence[Corpus], parts: Sequence[SelectedRows], request: SelectionRequest, tokenizer: Tokenizer
) -> CalibrationSet:
    """The set of all ``parts``, one for each of ``corpora``; their rows follow one another.

    Rows begin with the tokenizer's prefix and are padded with what does not count. A corpus may have no rows.

    Raises:
        CalibrantError: the mask leaves no token.
    """
    # A sample of words reads words, so no template writes its conversations.
    has_chat = any(part.findings.has_chat for part in parts) and request.strategy not in OF_WORDS
    prefixes = [_missing_prefix(row, tokenizer) for part in parts for row in part.rows]
    tokens, mask = _tensors(parts, prefixes, request, tokenizer)
    if not bool(mask.any()):
        raise CalibrantError('the mask leaves no token of the set; use `mask="all"` or other text')
    described = [
        corpus_record(corpus, len(part.rows), part.findings.first_unusable)
        for corpus, part in zip(corpora, parts, strict=True)
    ]
    manifest = Manifest(
        strategy=request.strategy,
        parameters=request.recorded(),
        seed=request.seed,
        draw=request.draw,
        samples=request.samples,
        length=request.length,
        tokenizer_sha256=tokenizer.sha256,
        tokenizer_files_sha256=tokenizer.files_sha256,
        corpora=described,
        evaluations=[Corpus(place, request.filters.leakage_field).describe() for place in request.filters.leakage],
        targets=[Corpus(place, request.target_field).describe() for place in request.targets],
        embedding_sha256=embedding_sha256(request.embedding),
        chat_template_sha256=tokenizer.chat_template.sha256 if has_chat else None,
        chat_template_date=DATE if has_chat else None,
        rows=_segments(parts, prefixes),
        counts=_counts(parts, mask, tokenizer),
    )
    return CalibrationSet.build(tokens, mask, manifest)


def _missing_prefix(row: list[int], tokenizer: Tokenizer) -> list[int]:
    # A chat template may have begun the row with the prefix.
    return [] if row[: len(tokenizer.prefix)] == tokenizer.prefix else tokenizer.prefix


def _tensors(
    parts: Sequence[SelectedRows], prefixes: list[list[int]], request: SelectionRequest, tokenizer: Tokenizer
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (int32) and mask (bool), both ``[rows, length]``."""
    rows = [row for part in parts for row in part.rows]
    masks = [mask for part in parts for mask in part.masks or [[True] * len(row) for row in part.rows]]
    tokens = torch.full((len(rows), request.length), tokenizer.padding_id, dtype=torch.int32)
    mask = torch.zeros(tokens.shape, dtype=torch.bool)
    for index, (prefix, row, counted) in enumerate(zip(prefixes, rows, masks, strict=True)):
        end = len(prefix) + len(row)
        tokens[index, :end] = torch.tensor([*prefix, *row], dtype=torch.int32)
        mask[index, :end] = torch.tensor([*[request.mask != "assistant"] * len(prefix), *counted], dtype=torch.bool)
    if request.mask == "no-special":
        mask &= ~torch.isin(tokens, torch.tensor(sorted(tokenizer.special_ids), dtype=torch.int32))
    return tokens, mask


def _segments(parts: Sequence[SelectedRows], prefixes: list[list[int]]) -> list[list[Segment]]:
    """Every row's segments, shifted by its prefix; with several parts, documents get the number of their part."""
    numbers = [f"{number}/" if len(parts) > 1 else "" for number, part in enumerate(parts) for _ in part.segments]
    segments = [row for part in parts for row in part.segments]
    # Rows of random words have a prefix but no segments.
    return [
        [
            segment.model_copy(update={"document": number + segment.document, "start": segment.start + len(prefix)})
            for segment in row
        ]
        for number, prefix, row in zip(numbers, prefixes, segments, strict=False)
    ]


def _counts(parts: Sequence[SelectedRows], mask: torch.Tensor, tokenizer: Tokenizer) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for part in parts:
        counts.update(part.counts)
    if "classes_covered" in counts:
        # Parts may cover the same classes, so their counts do not add up.
        classes = subword_classes(tokenizer)
        rows = [np.array(row, dtype=np.int64) for part in parts for row in part.rows]
        covered = classes[np.unique(np.concatenate(rows))]
        counts["classes"] = int(classes.max(initial=-1)) + 1
        counts["classes_covered"] = len(np.unique(covered[covered >= 0]))
    if "evaluation_texts_too_short" in counts:
        # Every part's filters read the same evaluation texts.
        counts["evaluation_texts_too_short"] //= sum("evaluation_texts_too_short" in part.counts for part in parts)
    empty = int((~mask.any(1)).sum())
    if empty:
        counts[EMPTY_ROWS] = empty
    return dict(counts)
