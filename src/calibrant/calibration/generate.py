"""Calibration sets without a corpus of their own: text that a model writes, or random tokens."""

from pathlib import Path
from typing import Any

from calibrant.calibration.calibration_set import CalibrationSet
from calibrant.calibration.corpus import Corpus
from calibrant.calibration.saved_set import saved_set
from calibrant.calibration.sources.answers import AnswersMask, generate_answers, read_prompts
from calibrant.calibration.sources.kept_rows import ROWS, RowsInJournal
from calibrant.calibration.sources.llm_qat import generate_llm_qat
from calibrant.calibration.sources.prefix import generate_from_prefixes
from calibrant.calibration.sources.self_calibration import (
    FirstTokens,
    TemperatureSchedule,
    generate_self_calibration,
)
from calibrant.calibration.sources.vocabulary import draw_vocabulary
from calibrant.errors import CalibrantError
from calibrant.journal import Journal
from calibrant.modeling.checkpoint import ModelFolder
from calibrant.modeling.hub import model_path
from calibrant.modeling.tokenizer import Tokenizer
from calibrant.modeling.whole_model import load_whole, torch_device, torch_dtype
from calibrant.output_folder import check_output
from calibrant.progress import NoProgress, Progress

# The papers use 128 rows of 2,048 tokens; a quarter of that length keeps a run on CPUs short (ours).
DEFAULT_SAMPLES = 128
DEFAULT_LENGTH = 512
DEFAULT_PERCENTILE = 80.0
SOURCES = ("self", "llm-qat", "prefix", "answers", "vocabulary")
# Sources that read a corpus, and those that sample at temperatures of the caller's.
_WITH_CORPUS, _WITH_TEMPERATURE = ("prefix", "answers"), ("self", "answers")


def generate(
    model: str | Path,
    *,
    strategy: str = "self",
    samples: int = DEFAULT_SAMPLES,
    length: int | None = None,
    seed: int = 0,
    draw: int = 0,
    temperature: TemperatureSchedule | None = None,
    first_tokens: FirstTokens = "any",
    corpus: Corpus | str | Path | None = None,
    percentile: float = DEFAULT_PERCENTILE,
    mask: AnswersMask = "all",
    batch_size: int = 64,
    device: str = "cpu",
    dtype: str = "auto",
    dequantize: bool = False,
    output: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> CalibrationSet:
    """Make a calibration set of text that a model writes, or of random tokens.

    Args:
        model: the model's folder, which also contains its tokenizer.
        strategy: "self" writes from BOS alone (arXiv 2410.17170 §3), "llm-qat" from random tokens (arXiv 2305.17888),
            "prefix" continues the beginnings of the documents of ``corpus`` and keeps the rows below ``percentile`` of
            perplexity (arXiv 2410.17711), "answers" asks the model the prompts of ``corpus`` through its chat template
            and keeps all that it answers, its reasoning too (arXiv 2509.12464), "vocabulary" draws tokens at random
            (arXiv 2410.17170).
        samples: number of rows.
        length: tokens per row, at most the model's context; by default 512, or the context if it is shorter.
        seed: seed of every random choice.
        draw: number of the set among the independent sets of one seed.
        temperature: temperatures of "self" and "answers"; constantly 1 by default.
        first_tokens: "english" makes every text of "self" begin with an English function word.
        corpus: the texts of "prefix" or the prompts of "answers": a corpus or its location. A prompt is a text, or a
            conversation up to its first answer.
        percentile: in (0, 100], for "prefix".
        mask: which tokens of "answers" count: "all", or what the model as "assistant" wrote.
        batch_size: rows that are written at a time.
        device: where the model runs, for example "cpu" or "cuda".
        dtype: dtype of the computation: "float32", "bfloat16" or "auto".
        dequantize: take a quantized model for the dense one that it stands for.
        output: a folder to save the set in. Then written batches outlive an interruption, in a journal beside the
            folder, and the same call continues from there.
        overwrite: replace an earlier output.
        progress: receives the progress.

    Raises:
        CalibrantError: the model folder or the corpus is unusable, or the options do not fit together.
    """
    read = [one for one in (model, corpus) if isinstance(one, str | Path)]
    read += [corpus.location] if isinstance(corpus, Corpus) else []
    target = check_output(output, overwrite, read) if output is not None else None
    folder = ModelFolder(model_path(model), dequantize=dequantize)
    length = length if length is not None else default_length(folder)
    check_size(samples, length, seed, draw)
    check_length(folder, length)
    tokenizer = Tokenizer(folder.path)
    if batch_size < 1:
        raise CalibrantError(f"batch size {batch_size}: must be at least 1")
    check_generation(strategy, corpus, temperature, first_tokens, percentile, mask)
    size: dict[str, int] = {"samples": samples, "length": length, "seed": seed, "draw": draw}
    texts = corpus if corpus is None or isinstance(corpus, Corpus) else Corpus(corpus)
    schedule = temperature or TemperatureSchedule()

    def made(journal: Journal | None = None) -> CalibrationSet:
        common: dict[str, Any] = {
            **size,
            "batch_size": batch_size,
            "progress": progress or NoProgress(),
            "provenance": folder.identity,
            "kept": RowsInJournal(journal, ROWS) if journal is not None else None,
        }
        if strategy == "vocabulary":
            return draw_vocabulary(tokenizer, **size).with_origin(str(model), [])
        if texts is not None and strategy == "answers":
            prompts = read_prompts(texts, tokenizer, length)
            loaded = load_whole(folder, device, dtype)
            found = generate_answers(loaded, tokenizer, prompts, schedule=schedule, mask=mask, **common)
            return found.with_origin(str(model), [texts.location])
        loaded = load_whole(folder, device, dtype)
        if texts is not None:
            found = generate_from_prefixes(loaded, tokenizer, texts, percentile=percentile, **common)
            return found.with_origin(str(model), [texts.location])
        if strategy == "llm-qat":
            return generate_llm_qat(loaded, tokenizer, **common).with_origin(str(model), [])
        found = generate_self_calibration(loaded, tokenizer, schedule=schedule, first_tokens=first_tokens, **common)
        return found.with_origin(str(model), [])

    if target is None:
        return made()
    place = torch_device(device)
    parameters = {"first_tokens": first_tokens, "percentile": percentile, "mask": mask, "batch_size": batch_size}
    identity = {
        "strategy": strategy,
        "parameters": {**size, **schedule.parameters, **parameters},
        "settings": {"device": str(place), "dtype": str(torch_dtype(dtype, place))},
        "tokenizer": tokenizer.identity,
        "corpora": [] if texts is None else [texts.describe()],
        "model": folder.identity,
    }
    return saved_set(target, overwrite, identity, made)


def check_generation(
    strategy: str, corpus: object, temperature: object, first_tokens: str, percentile: float, mask: str
) -> None:
    """Refuse options of ``generate`` that do not fit together; those that are not given are None or the default.

    Raises:
        CalibrantError: one of them belongs to another strategy, or is out of range.
    """
    if strategy not in SOURCES:
        raise CalibrantError(f"{strategy}: no source of that name; there are {', '.join(SOURCES)}")
    if first_tokens not in ("any", "english"):
        raise CalibrantError(f"{first_tokens}: no such first tokens; there are any, english")
    if not 0 < percentile <= 100:
        raise CalibrantError(f"percentile {percentile:g}: must be above 0 and at most 100")
    if mask not in ("all", "assistant"):
        raise CalibrantError(f"{mask}: no such mask of answers; there are all, assistant")
    if strategy == "prefix" and corpus is None:
        raise CalibrantError("prefix continues the beginnings of a corpus's texts: name one with `corpus`")
    if strategy == "answers" and corpus is None:
        raise CalibrantError("answers asks the model the prompts of a corpus: name one with `corpus`")
    if strategy not in _WITH_CORPUS and corpus is not None:
        raise CalibrantError(
            f'{strategy} reads no corpus: leave out `corpus`, or choose `strategy="prefix"` or `strategy="answers"`'
        )
    if strategy not in _WITH_TEMPERATURE and temperature is not None:
        raise CalibrantError(
            f'temperatures are for `strategy="self"` and `strategy="answers"`, not for {strategy}; leave them out'
        )
    if strategy != "self" and first_tokens != "any":
        raise CalibrantError(f'`first_tokens` are for `strategy="self"`, not for {strategy}; leave them out')
    if strategy != "answers" and mask != "all":
        raise CalibrantError(f'`mask` is for `strategy="answers"`, not for {strategy}; leave it out')
    if strategy != "prefix" and percentile != DEFAULT_PERCENTILE:
        raise CalibrantError(f'`percentile` is for `strategy="prefix"`, not for {strategy}')


def check_size(samples: int, length: int, seed: int, draw: int) -> None:
    """Refuse sizes and seeds that make no set.

    Raises:
        CalibrantError: one of them is too small.
    """
    if samples < 1 or length < 2 or draw < 0 or seed < 0:
        raise CalibrantError(
            f"{samples} samples of {length} tokens, seed {seed}, draw {draw}: "
            "need at least 1 sample of 2 tokens, and a seed and draw of at least 0"
        )


def default_length(folder: ModelFolder) -> int:
    """512 tokens, or the model's context if that is shorter."""
    return min(DEFAULT_LENGTH, folder.context_length or DEFAULT_LENGTH)


def check_length(folder: ModelFolder, length: int) -> None:
    """Refuse lengths beyond the model's context.

    Raises:
        CalibrantError: the length is too large.
    """
    context = folder.context_length
    if context is not None and length > context:
        raise CalibrantError(
            f"{folder.path}: {length} tokens are more than the model's context of {context}; use `length={context}`"
        )
