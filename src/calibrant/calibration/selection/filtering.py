"""Filters from a request."""

from itertools import chain

from calibrant.calibration.corpus import Corpus
from calibrant.calibration.filters import Filter
from calibrant.calibration.filters.content import IsConversation, LengthBetween, RepetitionBelow, ScriptIs
from calibrant.calibration.filters.duplicates import ExactDuplicates, NearDuplicates
from calibrant.calibration.filters.leakage import Leakage
from calibrant.calibration.selection.request import SelectionRequest
from calibrant.progress import Progress
from calibrant.randomness import make_rng


def filters_of(selection: SelectionRequest, progress: Progress) -> list[Filter]:
    """New filters, the cheapest first; ``progress`` is told what was left out of the evaluation texts."""
    request, seed = selection.filters, selection.seed
    filters: list[Filter] = [IsConversation()] if selection.mask == "assistant" else []
    if request.min_characters or request.max_characters is not None:
        filters.append(LengthBetween(request.min_characters, request.max_characters))
    if request.script is not None:
        filters.append(ScriptIs(request.script.upper()))
    if request.max_repetition is not None:
        filters.append(RepetitionBelow(request.max_repetition))
    if request.duplicates != "keep":
        filters.append(ExactDuplicates())
    if request.duplicates == "near":
        filters.append(NearDuplicates(make_rng(seed, "duplicates")))
    if request.leakage:
        evaluation = [Corpus(location, request.leakage_field) for location in request.leakage]
        documents = chain.from_iterable(evaluation)
        filters.append(Leakage(documents, request.leakage_run, not request.keep_leaked))
        for note in (note for corpus in evaluation for note in corpus.notes):
            progress.note(note)
    return filters
