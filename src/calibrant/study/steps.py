"""The work of a study: calibration sets, originals and cells. A step finds what it needs in the cache, and puts what it
made there, so that it can run in any process that sees the same files."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from calibrant.api import compress
from calibrant.calibration.calibration_set import CalibrationSet
from calibrant.calibration.corpus import OF_THE_PASS, Corpus
from calibrant.calibration.generate import generate
from calibrant.calibration.select import select
from calibrant.calibration.selection.request import WITH_DRAWS
from calibrant.calibration.sources.self_calibration import TemperatureSchedule
from calibrant.errors import CalibrantError
from calibrant.evaluation.comparison import Evaluation, evaluate_models
from calibrant.evaluation.original import StoredOriginal, store_states, stored_windows
from calibrant.evaluation.tasks.data_files import HUB, task_files
from calibrant.evaluation.text import EvaluationText, evaluation_windows, wikitext_windows
from calibrant.hashing import sha256_file, sha256_json
from calibrant.modeling.checkpoint import ModelFolder
from calibrant.modeling.tokenizer import Tokenizer
from calibrant.modeling.whole_model import load_whole, torch_device
from calibrant.progress import NoProgress
from calibrant.recipes.recipe import Recipe
from calibrant.study.cache import Cache
from calibrant.study.plan import GeneratedSource, GivenSource, Source, Text

# The fields of a source that ``select`` takes as they are.
SELECTION = (
    *("strategy", "windows", "pool", "keep", "percentile", "embedding", "targets", "target_field"),
    *("mask", "weights", "mix", "filters"),
)
SETS, ORIGINALS, OUTPUTS = "sets", "originals", "outputs"
_CHANGED = "{what} changed while the study ran; run the study again"
# Divergences are of float32 logits, whatever the compression computed in.
_DTYPE = "float32"


@dataclass(frozen=True)
class SetStep:
    """Makes draw ``draw`` of a source: the largest set, of which smaller ones are the first rows.

    ``texts`` are the identities of its corpora, evaluation texts and targets, ``given`` is the hash of a saved set.
    """

    key: str
    model: str
    source: Source
    draw: int
    samples: int
    length: int
    seed: int
    shards: int
    texts: tuple[dict[str, Any], ...]
    given: str | None
    device: str
    dtype: str

    def is_done(self, cache: Cache) -> bool:
        """Whether its result is in the cache."""
        return cache.place(SETS, self.key).is_dir() and cache.result(self.key) is not None

    def run(self, cache: Cache) -> None:
        """Make the set.

        Raises:
            CalibrantError: it cannot be made, or a text of it has changed since the study began.
        """
        begin = time.perf_counter()
        made = self._make()
        if self.given is not None and made.sha256 != self.given:
            raise CalibrantError(_CHANGED.format(what="the saved set"))
        manifest = made.manifest
        _check_unchanged(self.texts, [*manifest.corpora, *manifest.evaluations, *manifest.targets])
        cache.make(SETS, self.key, made.save)
        cache.keep(self.key, {"seconds": time.perf_counter() - begin})

    def _make(self) -> CalibrationSet:
        source = self.source
        if isinstance(source, GivenSource):
            return CalibrationSet.load(source.sets[self.draw])
        size: dict[str, Any] = {
            "samples": self.samples,
            "length": self.length,
            "seed": self.seed,
            "draw": self.draw,
            "device": self.device,
            "dtype": self.dtype,
        }
        if isinstance(source, GeneratedSource):
            schedule = source.temperature
            return generate(
                self.model,
                strategy=source.strategy,
                temperature=None if schedule is None else TemperatureSchedule(**schedule.model_dump()),
                first_tokens=source.first_tokens,
                corpus=None if source.corpus is None else Corpus(source.corpus, source.field),
                percentile=source.percentile,
                mask=source.mask,
                **size,
            )
        size |= {"stride": self.samples} if source.strategy in WITH_DRAWS else {"shards": self.shards}
        corpora = [Corpus(location, source.field) for location in source.corpora]
        return select(corpora, tokenizer=self.model, **{name: getattr(source, name) for name in SELECTION}, **size)


@dataclass(frozen=True)
class OriginalStep:
    """Runs an original model over a held-out text, once for all cells; ``corpus`` is the text's identity."""

    key: str
    model: str
    text: Text
    corpus: dict[str, Any]
    device: str

    def is_done(self, cache: Cache) -> bool:
        """Whether its results are in the cache."""
        return cache.place(ORIGINALS, self.key).is_dir() and cache.result(self.key) is not None

    def windows(self) -> EvaluationText:
        """Cut the text.

        Raises:
            CalibrantError: the text cannot be read, or is shorter than one window.
        """
        folder, text = ModelFolder(Path(self.model)), self.text
        tokenizer = Tokenizer(folder.path)
        if text.protocol == "wikitext":
            return wikitext_windows(text.corpus, tokenizer, folder.context_length, text.windows)
        return evaluation_windows(Corpus(text.corpus, text.field), tokenizer, text.length, text.windows)

    def run(self, cache: Cache) -> None:
        """Store the windows, the original's hidden states and its perplexity."""
        folder, windows = ModelFolder(Path(self.model)), self.windows()
        _check_unchanged([self.corpus], [Corpus(self.text.corpus, self.text.field).describe()])
        model = load_whole(folder, self.device, _DTYPE)
        cache.make(
            ORIGINALS,
            self.key,
            lambda target: store_states(model, folder, windows.windows, target, NoProgress()),
        )
        found = evaluate_models(model, None, windows, NoProgress())
        cache.keep(self.key, _measured(found))


@dataclass(frozen=True)
class TaskStep:
    """Scores an original model on a task, once for all cells; ``files`` are the hashes of its files in ``data``."""

    key: str
    model: str
    task: str
    data: str
    files: dict[str, str]
    limit: int | None
    device: str

    def is_done(self, cache: Cache) -> bool:
        """Whether its result is in the cache."""
        return cache.result(self.key) is not None

    def run(self, cache: Cache) -> None:
        """Score the original."""
        folder = ModelFolder(Path(self.model))
        cache.keep(self.key, self.score(load_whole(folder, self.device, _DTYPE), folder))

    def score(self, model: transformers.PreTrainedModel, folder: ModelFolder) -> dict[str, Any]:
        """The result of ``model``, whose tokenizer is in ``folder``."""
        from calibrant.evaluation.tasks.score import score_tasks  # lm-eval is an extra

        (found,) = score_tasks(model, Tokenizer(folder.path), (self.task,), self.data, self.limit, NoProgress())
        if self.files != data_hashes(self.task, self.data):
            raise CalibrantError(_CHANGED.format(what=f"the data of {self.task}"))
        return {
            "measures": {name: (one.value, one.standard_error) for name, one in found.metrics.items()},
            "items": {found.main: list(found.scores)},
            "task": {
                "main": found.main,
                "shots": found.shots,
                "version": found.version,
                "sha256": found.sha256,
                "lm_eval": found.lm_eval_version,
                "revision": found.revision,
            },
        }


# What originals are measured on before cells are compared with them.
Yardstick = OriginalStep | TaskStep


@dataclass(frozen=True)
class CellStep:
    """Compresses a model on the first rows of a set, and measures what came of it.

    ``key`` identifies the compression; ``yardsticks`` are the texts and tasks that the original was measured on.
    """

    key: str
    model: str
    recipe: Recipe
    set_key: str
    samples: int
    seed: int
    yardsticks: tuple[Yardstick, ...]
    keep_output: bool
    device: str
    dtype: str

    def result_keys(self) -> tuple[str, ...]:
        """Keys of its results in the cache: the compression's, then one of each yardstick."""
        return (self.key, *map(self._measure_key, self.yardsticks))

    def is_done(self, cache: Cache) -> bool:
        """Whether its results are in the cache."""
        kept = not self.keep_output or cache.place(OUTPUTS, self.key).is_dir()
        return kept and all(cache.result(key) is not None for key in self.result_keys())

    def run(self, cache: Cache) -> None:
        """Compress, unless the output was kept, and measure."""
        kept = cache.place(OUTPUTS, self.key)
        if kept.is_dir() and cache.result(self.key) is not None:
            self._measure(cache, kept)
            return
        with cache.scratch(OUTPUTS, self.key) as own:
            self._compress(cache, own / "new")
            self._measure(cache, own / "new")
            if self.keep_output:
                cache.publish(own / "new", OUTPUTS, self.key)

    def _compress(self, cache: Cache, output: Path) -> None:
        place = cache.place(SETS, self.set_key)
        try:
            calibration = CalibrationSet.load(place).head(self.samples)
        except CalibrantError as error:
            raise CalibrantError(f"{error}; delete {place}, it is made again") from error
        report = compress(
            self.model,
            output=output,
            recipe=self.recipe,
            calibration=calibration,
            seed=self.seed,
            device=self.device,
            dtype=self.dtype,
        )
        cache.keep(
            self.key,
            {
                "measures": {"output_bytes": (report.bytes_after, None)},
                "items": {},
                "set_sha256": calibration.sha256,
                "notes": report.notes,
                "fallbacks": len(report.fallbacks),
                "seconds": report.seconds,
                "peak_memory_bytes": report.peak_memory_bytes,
            },
        )

    def _measure(self, cache: Cache, output: Path) -> None:
        folder = ModelFolder(output, allow_quantized=True)
        model = load_whole(folder, self.device, _DTYPE)
        for yardstick in self.yardsticks:
            key = self._measure_key(yardstick)
            if cache.result(key) is None:
                if isinstance(yardstick, TaskStep):
                    cache.keep(key, yardstick.score(model, folder))
                else:
                    cache.keep(key, self._compare(cache, model, yardstick))

    def _compare(self, cache: Cache, model: transformers.PreTrainedModel, original: OriginalStep) -> dict[str, Any]:
        states = cache.place(ORIGINALS, original.key)
        windows = stored_windows(states)
        stored = StoredOriginal(ModelFolder(Path(self.model)), states, torch_device(self.device))
        text = EvaluationText(windows, windows.numel(), 0)
        return _measured(evaluate_models(model, stored, text, NoProgress()))

    def _measure_key(self, yardstick: Yardstick) -> str:
        return sha256_json({"compression": self.key, "original": yardstick.key})


Step = SetStep | OriginalStep | TaskStep | CellStep


def data_hashes(task: str, data: str) -> dict[str, str]:
    """Hashes of the files of a task by their names; none of tasks from the hub."""
    return {} if data == HUB else {path.name: sha256_file(path) for path in task_files(task, Path(data))}


def _check_unchanged(wanted: Sequence[dict[str, Any]], found: Sequence[dict[str, Any]]) -> None:
    """Refuse a result of other texts than those that its key stands for.

    Raises:
        CalibrantError: a text has changed; the message names it.
    """
    for before, now in zip(wanted, found, strict=True):
        if any(now.get(name) != value for name, value in before.items() if name not in OF_THE_PASS):
            raise CalibrantError(_CHANGED.format(what=f"the text {before.get('name')}"))


def _measured(found: Evaluation) -> dict[str, Any]:
    """An evaluation as a result: measures with their standard errors, and the values of each window."""
    measures: dict[str, tuple[float, float | None]] = {}
    if found.perplexity is not None:
        measures["perplexity"] = (found.perplexity.value, None)
    items = {"loss": list(found.loss_by_window)}
    divergence = found.divergence
    if divergence is not None:
        measures["kl"] = (divergence.kl_mean, divergence.kl_standard_error)
        measures["log_perplexity_ratio"] = (divergence.log_ratio, None)
        measures["same_top"] = (divergence.same_top, divergence.same_top_standard_error)
        items["kl"] = list(divergence.kl_by_window)
    return {"measures": measures, "items": items}
