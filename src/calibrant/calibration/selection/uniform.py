"""Uniform selection: non-overlapping sets cut from one shuffle of the corpus (methods.md §21)."""

import torch

from calibrant.calibration.calibration_set import CalibrationSet, Manifest
from calibrant.calibration.corpus import Corpus
from calibrant.calibration.randomness import generator
from calibrant.calibration.tokenizer import Tokenizer
from calibrant.calibration.windows import Policy, Window, windows
from calibrant.errors import CalibrantError
from calibrant.progress import Progress


def select_uniform(
    corpus: Corpus,
    tokenizer: Tokenizer,
    *,
    samples: int,
    length: int,
    seed: int,
    draw: int,
    policy: Policy,
    progress: Progress,
) -> CalibrationSet:
    """Draw ``draw`` (0, 1, ...) of the sets of ``samples`` windows that one seeded shuffle gives.

    Draw ``k`` is windows ``k * samples`` to ``(k + 1) * samples`` of that shuffle, so two draws of one seed share
    no window and the union does not depend on how many draws are made.

    Raises:
        CalibrantError: the corpus is empty or too small for this draw; the message says how much there is.
    """
    documents = list(corpus)
    if not documents:
        raise CalibrantError(f"{corpus.location}: the corpus is empty, it has no document with text")
    order = generator(seed, "shuffle").permutation(len(documents))
    counts = {"documents": len(documents), "documents_used": 0, "documents_too_short": 0, **corpus.counts}
    first, wanted = draw * samples, (draw + 1) * samples
    shuffled = (documents[index] for index in order)
    stream = windows(shuffled, tokenizer, length, policy, generator(seed, "offset"), counts)
    chosen: list[Window] = []
    found = 0
    with progress.task("selecting windows", wanted) as task:
        for found, window in enumerate(stream, start=1):
            if found > first:
                chosen.append(window)
            task.advance()
            if found == wanted:
                break
    if found < wanted:
        raise CalibrantError(
            f"{corpus.location}: only {found} windows of {length} tokens in {len(documents)} documents, "
            f"draw {draw} of {samples} needs {wanted}; use fewer samples, a shorter length"
            + (" or --windows pack" if policy == "window" else " or more text")
        )
    manifest = Manifest(
        strategy="uniform",
        parameters={"windows": policy},
        seed=seed,
        draw=draw,
        samples=samples,
        length=length,
        tokenizer_sha256=tokenizer.sha256,
        corpus=corpus.describe(),
        rows=[window.segments for window in chosen],
        counts=counts,
    )
    tokens = torch.tensor([window.tokens for window in chosen], dtype=torch.int32)
    return CalibrationSet.build(tokens, torch.ones_like(tokens, dtype=torch.bool), manifest)
