"""Conversations in which the model itself answers prompts of a corpus, reasoning included (arXiv 2509.12464)."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import transformers

from calibrant.calibration.calibration_set import CalibrationSet, Manifest, Segment
from calibrant.calibration.chat import encode_prompt
from calibrant.calibration.corpus import Corpus, corpus_record
from calibrant.calibration.sources.self_calibration import TemperatureSchedule
from calibrant.calibration.sources.text_generation import KeptRows, Sampling, compute_place, write_rows
from calibrant.errors import CalibrantError
from calibrant.modeling.chat_template import DATE, RefusedError
from calibrant.modeling.tokenizer import Tokenizer
from calibrant.progress import Progress
from calibrant.randomness import make_rng

AnswersMask = Literal["all", "assistant"]


@dataclass(frozen=True)
class Prompts:
    """The prompts of a corpus as token ids, with their documents' ids, and what the corpus held.

    ``counts`` has the documents that were read, and those that were left out by why. ``note`` says the latter.
    """

    corpus: Corpus
    names: list[str]
    ids: list[list[int]]
    counts: dict[str, int]
    note: str


def check_chat_template(tokenizer: Tokenizer) -> None:
    """Refuse tokenizers whose model cannot be asked.

    Raises:
        CalibrantError: the tokenizer has no chat template.
    """
    if tokenizer.hf.chat_template is None:
        raise CalibrantError(
            "answers asks the model through its chat template, and its tokenizer has none; choose a model that was "
            'tuned for chat, or `strategy="prefix"`, which lets any model continue texts'
        )


def read_prompts(corpus: Corpus, tokenizer: Tokenizer, length: int) -> Prompts:
    """Every prompt of ``corpus`` as the chat template writes it, the request for an answer included.

    Left out are conversations that the template refuses or that ask nothing, and prompts of more than half of
    ``length``, so that most of a row is answers (ours).

    Raises:
        CalibrantError: the tokenizer has no chat template, or no prompt is left.
    """
    check_chat_template(tokenizer)
    names, found = [], []
    counts = dict.fromkeys(("documents", "conversations_refused", "documents_without_a_prompt", "prompts_too_long"), 0)
    refusal = ""
    for document in corpus:
        counts["documents"] += 1
        try:
            ids = encode_prompt(document, tokenizer)
        except RefusedError as error:
            counts["conversations_refused"] += 1
            refusal = refusal or f" (the first refused: {error})"
            continue
        if not ids:
            counts["documents_without_a_prompt"] += 1
        elif len(ids) > length // 2:
            counts["prompts_too_long"] += 1
        else:
            names.append(document.id)
            found.append(ids)
    dropped = ", ".join(f"{name} {count}" for name, count in counts.items() if name != "documents" and count)
    if not found:
        raise CalibrantError(
            f"{corpus.location}: none of its {counts['documents']} documents is a prompt of at most {length // 2} "
            f"tokens, half of a row ({dropped or 'it has no text'}){refusal}"
        )
    note = f"{corpus.location}: left out as prompts: {dropped}{refusal}" if dropped else ""
    return Prompts(corpus, names, found, counts | corpus.counts, note)


def generate_answers(
    model: transformers.PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: Prompts,
    *,
    samples: int,
    length: int,
    seed: int,
    draw: int,
    schedule: TemperatureSchedule,
    mask: AnswersMask,
    batch_size: int,
    progress: Progress,
    provenance: dict[str, str],
    kept: KeptRows | None = None,
) -> CalibrationSet:
    """Let ``model`` answer prompts: a row is a prompt, the answer, the next prompt, ..., cut at ``length`` tokens.

    Answers are the model's own distribution at the temperatures of ``schedule``, counted from an answer's first token,
    without top-k, top-p or penalty, and keep everything that the model writes, such as its reasoning (arXiv 2509.12464)
    and the token that ends them. Conversations of a row do not see each other. ``mask`` "assistant" counts what the
    model wrote, "all" the prompts too. The first prompts of all rows and draws are different ones; where answers are
    short, rows go on with prompts that other draws may have, too (ours). ``provenance`` is recorded in the manifest;
    ``kept`` is that of ``write_rows``.

    Raises:
        CalibrantError: there are fewer prompts than rows.
    """
    corpus, count = prompts.corpus, len(prompts.ids)
    if count < samples * (draw + 1):
        raise CalibrantError(
            f"{corpus.location}: {count} prompts, but draw {draw} of {samples} rows needs {samples * (draw + 1)}; "
            "use fewer samples or more prompts"
        )
    for note in filter(None, (*corpus.notes, prompts.note)):
        progress.note(note)
    order = make_rng(seed, "answers").permutation(count)
    uniforms = np.stack([make_rng(seed, "answers", draw, row).random(length) for row in range(samples)])

    def chosen(row: int, text: int) -> int:
        return int(order[((draw + text) * samples + row) % count])

    written = write_rows(
        model,
        tokenizer,
        uniforms,
        lambda row, text: prompts.ids[chosen(row, text)],
        Sampling(schedule.table(length)),
        batch_size,
        progress,
        kept,
    )
    asked = [[chosen(row, text) for text in range(len(starts))] for row, starts in enumerate(written.starts)]
    again = written.generations - len({prompt for row in asked for prompt in row})
    if again:
        progress.note(f"{corpus.location}: answers so short that {again} of its {count} prompts were asked again")
    counted = torch.ones_like(written.tokens, dtype=torch.bool)
    segments: list[list[Segment]] = [[] for _ in range(samples)]
    for row, starts in enumerate(written.starts):
        for prompt, start in zip(asked[row], starts, strict=True):
            size = min(len(prompts.ids[prompt]), length - start)
            segments[row].append(Segment(document=prompts.names[prompt], offset=0, start=start, length=size))
            if mask == "assistant":
                counted[row, start : start + size] = False
    manifest = Manifest(
        strategy="answers",
        parameters={**schedule.parameters, "mask": mask, "batch_size": batch_size, **compute_place(model)},
        seed=seed,
        draw=draw,
        samples=samples,
        length=length,
        tokenizer_sha256=tokenizer.sha256,
        tokenizer_files_sha256=tokenizer.files_sha256,
        chat_template_sha256=tokenizer.chat_template.sha256,
        chat_template_date=DATE,
        corpora=[corpus_record(corpus, samples, corpus.first_unusable)],
        model=dict(provenance),
        rows=segments,
        counts={**prompts.counts, "prompts": count, "generations": written.generations},
    )
    return CalibrationSet.build(written.tokens, counted, manifest)
