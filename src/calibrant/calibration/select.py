"""Calibration sets selected from corpora."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import transformers

from calibrant.calibration.calibration_set import CalibrationSet
from calibrant.calibration.corpus import Corpus
from calibrant.calibration.generate import DEFAULT_SAMPLES, check_length
from calibrant.calibration.saved_set import saved_set
from calibrant.calibration.selection.model_scores import Scoring
from calibrant.calibration.selection.request import (
    LEXICAL,
    FilterRequest,
    MixRequest,
    SelectionRequest,
    StrategyName,
    selection_request,
    usual_length,
)
from calibrant.calibration.selection.selecting import WITH_MODEL, select_from
from calibrant.calibration.windows import Policy
from calibrant.errors import CalibrantError
from calibrant.executors import Executor, ExecutorName, make_executor
from calibrant.journal import Journal
from calibrant.modeling.checkpoint import ModelFolder
from calibrant.modeling.hub import model_path
from calibrant.modeling.tokenizer import Tokenizer
from calibrant.modeling.whole_model import load_whole, torch_device, torch_dtype
from calibrant.output_folder import check_output
from calibrant.progress import NoProgress, Progress


def select(
    corpus: Corpus | str | Path | Sequence[Corpus | str | Path],
    *,
    tokenizer: str | Path,
    strategy: StrategyName = "uniform",
    samples: int = DEFAULT_SAMPLES,
    length: int | None = None,
    seed: int = 0,
    draw: int = 0,
    stride: int | None = None,
    windows: Policy = "pack",
    shards: int = 1,
    parts: int | None = None,
    executor: ExecutorName = "local",
    pool: int | None = None,
    keep: Literal["lowest", "middle", "below"] = "below",
    percentile: float = 80.0,
    embedding: str = LEXICAL,
    targets: Sequence[str | Path] = (),
    target_field: str = "text",
    mask: Literal["all", "assistant", "no-special"] = "all",
    weights: Sequence[float] | None = None,
    mix: MixRequest | None = None,
    filters: FilterRequest | None = None,
    device: str = "cpu",
    dtype: str = "auto",
    output: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> CalibrationSet:
    """Select a calibration set from one corpus or several.

    ``corpus`` is a ``Corpus``, a location (see ``Corpus``), or a list of these; ``tokenizer`` is a model folder.
    A string is a location, never a text: texts of your own go in as ``Corpus([...])``. ``strategy`` and the options
    that belong to it are described in ``SelectionRequest``; "k-center" is accepted for "k-centre". Rows have ``length``
    tokens, by default 512, and 128 for "words_dataset".

    Draw k shares no window with draw j: "uniform" cuts all draws from one shuffle, and draws of most other strategies
    see disjoint parts of the corpus (``shards``). Draws of "uniform", "unigram" and "words_dataset" begin every
    ``stride`` rows, by default 128 or ``samples`` if that is more, so that sets of one draw and of growing size are
    nested. "perplexity", "cola" and "acdm" run the model in the tokenizer's folder over every candidate, on ``device``
    in ``dtype``; "acdm" compares them with ``targets``, locations of texts typical of the model's purpose.
    Conversations go through the tokenizer's chat template; ``mask`` says which tokens count: "all", those an
    "assistant" wrote, or all but special ones ("no-special"). Several corpora share the samples by ``weights``, groups
    of a corpus's documents (scripts or lengths) by ``mix``. ``parts`` splits the work of "zipcal" into two rounds over
    random parts of the corpus, which ``executor`` "ray" runs on a cluster; by default ``parts`` is 1, or with Ray the
    cluster's number of processors. ``output`` is a folder to save the set in, which must not exist unless
    ``overwrite``; then the scores of "perplexity", "cola" and "acdm" outlive an interruption, in a journal beside it,
    and the same call continues from there. Other strategies read the corpus again.

    Raises:
        CalibrantError: a corpus cannot be read, is empty or too small, or the options do not fit together.
    """
    given = [corpus] if isinstance(corpus, Corpus | str | Path) else list(corpus)
    if not given:
        raise CalibrantError("no corpus is given")
    read = [one.location if isinstance(one, Corpus) else one for one in given]
    target = check_output(output, overwrite, [*read, tokenizer, *targets]) if output is not None else None
    if executor != "local" and strategy != "zipcal":
        raise CalibrantError(
            f'`executor="{executor}"` runs the parts of zipcal; {strategy} runs here: leave out `executor`'
        )
    runner = make_executor(executor)
    request = selection_request(
        strategy=strategy,
        windows=windows,
        samples=samples,
        length=length if length is not None else usual_length(strategy),
        seed=seed,
        draw=draw,
        stride=stride,
        shards=shards,
        parts=parts if parts is not None else runner.slots,
        pool=pool,
        keep=keep,
        percentile=percentile,
        embedding=embedding,
        targets=tuple(map(str, targets)),
        target_field=target_field,
        mask=mask,
        weights=None if weights is None else tuple(weights),
        mix=mix or MixRequest(),
        filters=filters or FilterRequest(),
    )
    corpora = [one if isinstance(one, Corpus) else Corpus(one) for one in given]

    def identity() -> dict[str, Any]:
        found: dict[str, Any] = {"strategy": request.strategy, "request": request.model_dump(mode="json")}
        if request.strategy not in WITH_MODEL:
            return found
        place = torch_device(device)
        targets = [Corpus(location, target_field) for location in request.targets]
        leaking = [Corpus(location, request.filters.leakage_field) for location in request.filters.leakage]
        return {
            **found,
            "tokenizer": Tokenizer(model_path(tokenizer)).identity,
            "corpora": [corpus.describe() for corpus in corpora],
            "targets": [corpus.describe() for corpus in targets],
            "leakage": [corpus.describe() for corpus in leaking],
            "settings": {"device": str(place), "dtype": str(torch_dtype(dtype, place))},
            "model": ModelFolder(model_path(tokenizer)).identity,
        }

    def made(journal: Journal | None = None) -> CalibrationSet:
        return run_selection(corpora, str(tokenizer), request, device, dtype, runner, progress or NoProgress(), journal)

    return made() if target is None else saved_set(target, overwrite, identity(), made)


def run_selection(
    corpora: Sequence[Corpus],
    model: str,
    request: SelectionRequest,
    device: str,
    dtype: str,
    executor: Executor,
    progress: Progress,
    journal: Journal | None = None,
) -> CalibrationSet:
    """Select from ``corpora`` by ``request`` and record where the inputs were; ``model`` is a folder.

    ``journal`` keeps the scores of strategies that run the model.

    Raises:
        CalibrantError: see ``select``.
    """
    path = model_path(model)
    scored: dict[str, Any] = {}

    def load_model() -> transformers.PreTrainedModel:
        folder = ModelFolder(path)
        check_length(folder, request.length)
        loaded = load_whole(folder, device, dtype)
        scored.update(folder.identity, device=device, dtype=str(loaded.dtype).removeprefix("torch."))
        return loaded

    if request.strategy in WITH_MODEL:
        ModelFolder(path)
    made = select_from(corpora, str(path), request, Scoring(load_model, journal), executor, progress)
    if scored:
        made = CalibrationSet(made.tokens, made.mask, made.manifest.model_copy(update={"model": scored}))
    return made.with_origin(model, [corpus.location for corpus in corpora])
