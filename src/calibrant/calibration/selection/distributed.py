"""ZipCal in parts of a corpus: greedy in every part, then greedy over the parts' choices.

These are the two rounds of GreeDi (arXiv 1411.0541) on a random partition; the best single part's choice is kept if it
covers more. The expected coverage is at least ``(1 - 1/e) / 2`` of the best, half of greedy's bound (arXiv 1502.02606,
theorem 1).
"""

from dataclasses import dataclass, replace

import numpy as np

from calibrant.calibration.corpus import Corpus
from calibrant.calibration.document_stream import DocumentStream, Findings, together
from calibrant.calibration.selection.filtering import filters_of
from calibrant.calibration.selection.request import SelectionRequest
from calibrant.calibration.selection.selector import cutting_of, select_windows
from calibrant.calibration.selection.zipcal import ZipCal
from calibrant.calibration.windows import Window
from calibrant.errors import CalibrantError
from calibrant.executors import Executor
from calibrant.modeling.tokenizer import Tokenizer
from calibrant.progress import NoProgress, Progress
from calibrant.randomness import make_rng


@dataclass(frozen=True)
class PartTask:
    """One part of the first round, picklable so that it can run on another machine."""

    corpus: Corpus
    model: str
    request: SelectionRequest
    part: int


@dataclass(frozen=True)
class PartResult:
    """The windows that a part chose, its counts, and what it found beside."""

    windows: list[Window]
    counts: dict[str, int]
    findings: Findings


def zipcal_in_parts(
    corpus: Corpus, model: str, request: SelectionRequest, executor: Executor, progress: Progress
) -> PartResult:
    """The windows of the second round in the order of the picks, and the sums of the parts' counts.

    Filters that remember documents (duplicates) only know those of their own part.

    Raises:
        CalibrantError: the parts together have too few candidates.
    """
    tasks = [PartTask(corpus, model, request, part) for part in range(request.parts)]
    with progress.task(f"selecting in {len(tasks)} parts", None):
        results = executor.map(select_part, tasks)
    names = dict.fromkeys(name for result in results for name in result.counts)
    counts = {name: sum(result.counts.get(name, 0) for result in results) for name in names}
    # Every part reads the whole corpus, so these counts do not add up.
    counts |= {name: results[0].counts[name] for name in ("documents", *corpus.counts)}
    windows = [window for result in results for window in result.windows]
    findings = together(result.findings for result in results)
    if len(windows) < request.samples:
        raise CalibrantError(
            f"{corpus.location}: its {request.parts} parts gave {len(windows)} windows of {request.length} tokens, "
            f"{request.samples} are needed; use fewer samples or parts, or more text"
            + "".join(f" ({note})" for note in findings.notes)
        )
    union = _zipcal(model, request)
    union.see(windows)
    chosen = union.choose(request.samples)
    best = max(results, key=lambda result: result.counts["classes_covered"])
    if best.counts["classes_covered"] > union.covered and len(best.windows) == request.samples:
        covered = {"classes_covered": best.counts["classes_covered"]}
        return PartResult(best.windows, counts | covered, findings)
    return PartResult([windows[index] for index in chosen], counts | union.counts(), findings)


def select_part(task: PartTask) -> PartResult:
    """The first round in one part; a part with too few candidates gives all of them."""
    request = task.request
    tokenizer = Tokenizer(task.model)
    stream = DocumentStream(
        task.corpus,
        filters_of(request, NoProgress()),
        make_rng(request.seed, "part"),
        task.part,
        request.parts,
    )
    cutting = cutting_of(request, tokenizer)
    selector = _zipcal(task.model, request)
    offsets = make_rng(request.seed, "offset", task.part)
    chosen = select_windows(
        stream, tokenizer, cutting, selector, request.samples, offsets, NoProgress(), all_if_fewer=True
    )
    return PartResult([replace(window) for window in chosen], dict(stream.counts), stream.findings)


def _zipcal(model: str, request: SelectionRequest) -> ZipCal:
    return ZipCal(Tokenizer(model), None, np.random.default_rng(0))
