"""A plan with everything it names found and checked, and the steps that carry it out."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from calibrant.calibration.calibration_set import CalibrationSet, read_manifest, set_library_versions
from calibrant.calibration.corpus import Corpus
from calibrant.calibration.generate import check_generation, check_length
from calibrant.calibration.selection.embeddings import check_embedding
from calibrant.calibration.selection.request import WITH_DRAWS, selection_request
from calibrant.calibration.selection.selecting import WITH_MODEL
from calibrant.calibration.sources.answers import check_chat_template
from calibrant.errors import CalibrantError
from calibrant.evaluation.tasks.data_files import HUB, check_tasks
from calibrant.hashing import sha256_file, sha256_json
from calibrant.modeling.checkpoint import ModelFolder
from calibrant.modeling.hub import model_path
from calibrant.modeling.tokenizer import Tokenizer, tokenizer_files_sha256
from calibrant.modeling.whole_model import torch_device, torch_dtype
from calibrant.pipeline.prepare import PreparedRun, check_calibration, prepare
from calibrant.pipeline.record import library_versions
from calibrant.progress import Progress
from calibrant.recipes.recipe import Recipe, load_recipe
from calibrant.study.cache import Cache
from calibrant.study.cells import ORIGINAL, Cell, grid
from calibrant.study.plan import GeneratedSource, GivenSource, SelectedSource, Source, StudyPlan, Tasks, Text
from calibrant.study.steps import SELECTION, CellStep, OriginalStep, SetStep, TaskStep, Yardstick, data_hashes
from calibrant.training.train_model import generator_identity
from calibrant.version import __version__

# Where texts lie says nothing about them; their contents do.
_LOCATIONS: Any = {"corpus": True, "targets": True, "filters": {"leakage": True}}


@dataclass(frozen=True)
class Model:
    """A model of a study: its label, folder and identity."""

    label: str
    path: Path
    identity: dict[str, Any]


@dataclass(frozen=True)
class CellWork:
    """A cell and the steps that it needs: its set, the yardsticks by the label of text or task, and the cell itself."""

    cell: Cell
    set_step: SetStep
    yardsticks: dict[str, Yardstick]
    step: CellStep
    model_sha256: str

    @property
    def needs(self) -> list[SetStep | Yardstick]:
        """The steps that must be done before the cell's."""
        return [self.set_step, *self.yardsticks.values()]


@dataclass(frozen=True)
class Resolved:
    """A checked study: its ``cells``, and the prepared run of every model and recipe, which can be estimated."""

    plan: StudyPlan
    models: dict[str, Model]
    recipes: dict[str, Recipe]
    cells: list[CellWork]
    prepared: dict[tuple[str, str], PreparedRun]

    def yardsticks(self, model: str) -> dict[str, Yardstick]:
        """The steps that measure an original, by the label of text or task."""
        return next(work.yardsticks for work in self.cells if work.cell.model == model)


def resolve(plan: StudyPlan, cache: Cache, progress: Progress) -> Resolved:
    """Find and check the plan's models, recipes, sources and texts, without running anything.

    Raises:
        CalibrantError: something does not exist or does not fit; the message names it.
    """
    place = torch_device(plan.device)
    dtype = str(torch_dtype(plan.dtype, place)).removeprefix("torch.")
    found_models = []
    for name in plan.models:
        with _named(f"model {name}"):
            found_models.append(_model(name))
    models = {one.label: one for one in found_models}
    recipes = {one.name: one for one in map(load_recipe, plan.recipes)}
    for kind, found, named in (("models", models, plan.models), ("recipes", recipes, plan.recipes)):
        if len(found) < len(named):
            raise CalibrantError(f"study {plan.name}: two of the {kind} {', '.join(named)} have one name; rename one")
    if ORIGINAL in recipes:
        raise CalibrantError(f"study {plan.name}: {ORIGINAL} is the name of uncompressed models; rename the recipe")
    for label, source in plan.sources.items():
        _check_source(label, source, plan, list(models.values()))
    for label, text in plan.texts.items():
        with _named(f"text {label}"):
            if text.protocol == "wikitext" and not Path(text.corpus).is_file():
                raise CalibrantError(f"{text.corpus}: no such file; protocol wikitext reads one")
            _check_corpus(text.corpus, text.field)
            for model in models.values():
                check_length(ModelFolder(model.path), text.length if text.protocol == "windows" else 0)
    if plan.tasks is not None:
        with _named("tasks"):
            check_tasks(plan.tasks.names, plan.tasks.data)
    for model in models.values():
        with _named("the rows of sets"):
            check_length(ModelFolder(model.path), max(plan.length))
    prepared = {}
    with progress.task("checking", len(models) * len(recipes), "compressions") as task:
        for model in models.values():
            for name, recipe in recipes.items():
                prepared[model.label, name] = _prepared(model, recipe, plan, cache)
                task.advance()
    steps = _Steps(plan, models, recipes, place, dtype)
    cells = [steps.work(cell) for cell in grid(plan, list(models), list(recipes))]
    resolved = Resolved(plan, models, recipes, cells, prepared)
    for label in models:
        _check_texts(resolved.yardsticks(label), cache)
    return resolved


@contextmanager
def _named(part: str) -> Iterator[None]:
    """Put the part of the plan in front of what is wrong with it."""
    try:
        yield
    except CalibrantError as error:
        raise CalibrantError(f"{part}: {error}") from error


def _model(name: str) -> Model:
    folder = ModelFolder(model_path(name))
    tokenizer = tokenizer_files_sha256(folder.path) or Tokenizer(folder.path).sha256
    templates = {path.name: sha256_file(path) for path in sorted(folder.path.glob("chat_template*")) if path.is_file()}
    identity = {**folder.identity, "tokenizer_sha256": tokenizer, "chat_templates": templates}
    return Model(folder.name, folder.path, identity)


def _prepared(model: Model, recipe: Recipe, plan: StudyPlan, cache: Cache) -> PreparedRun:
    with _named(f"recipe {recipe.name} on {model.label}"):
        return prepare(
            model.path,
            output=cache.folder / "outputs" / "estimate",
            recipe=recipe,
            samples=max(plan.samples),
            length=max(plan.length),
            seed=plan.seeds[0],
            device=plan.device,
            dtype=plan.dtype,
        )


def _check_texts(yardsticks: dict[str, Yardstick], cache: Cache) -> None:
    """Refuse a text that has no window, unless the original ran over it already."""
    for label, step in yardsticks.items():
        if isinstance(step, OriginalStep) and not step.is_done(cache):
            with _named(f"text {label}"):
                step.windows()


def _check_source(label: str, source: Source, plan: StudyPlan, models: list[Model]) -> None:
    with _named(f"source {label}"):
        if isinstance(source, GivenSource):
            _check_given(source, plan, models)
        elif isinstance(source, SelectedSource):
            _check_selected(source, plan)
        else:
            _check_generated(source, models)


def _check_given(source: GivenSource, plan: StudyPlan, models: list[Model]) -> None:
    for folder in source.sets[: plan.draws]:
        calibration = CalibrationSet.load(folder)
        manifest = calibration.manifest
        if plan.length != (manifest.length,) or manifest.samples < max(plan.samples):
            raise CalibrantError(
                f"{folder}: has {manifest.samples} rows of {manifest.length} tokens, where the study takes "
                f"{max(plan.samples)} rows of {' and '.join(map(str, plan.length))}"
            )
        for model in models:
            with _named(folder):
                check_calibration(ModelFolder(model.path), calibration)


def _check_selected(source: SelectedSource, plan: StudyPlan) -> None:
    size = {"samples": max(plan.samples), "length": max(plan.length), "draw": plan.draws - 1}
    shards = 1 if source.strategy in WITH_DRAWS else plan.shards
    selection_request(**{name: getattr(source, name) for name in SELECTION}, **size, shards=shards)
    if source.weights is not None and len(source.weights) != len(source.corpora):
        raise CalibrantError(f"weights name {len(source.weights)} of {len(source.corpora)} corpora; give one for each")
    check_embedding(source.embedding)
    for location in source.corpora:
        _check_corpus(location, source.field)
    for location in source.filters.leakage:
        with _named("filters.leakage"):
            Corpus(location)
    for location in source.targets:
        with _named("targets"):
            _check_corpus(location, source.target_field)


def _check_generated(source: GeneratedSource, models: list[Model]) -> None:
    check_generation(
        source.strategy, source.corpus, source.temperature, source.first_tokens, source.percentile, source.mask
    )
    if source.corpus is not None:
        _check_corpus(source.corpus, source.field)
    if source.strategy == "answers":
        for model in models:
            check_chat_template(Tokenizer(model.path))


def _check_corpus(location: str, field: str) -> None:
    """Refuse a corpus without a text under ``field``; the first one is read."""
    if next(iter(Corpus(location, field)), None) is None:
        raise CalibrantError(f"{location} has no text")


class _Steps:
    """Makes the steps of cells; equal steps are one object."""

    def __init__(
        self, plan: StudyPlan, models: dict[str, Model], recipes: dict[str, Recipe], device: torch.device, dtype: str
    ) -> None:
        self._plan, self._models, self._recipes = plan, models, recipes
        self._device, self._dtype = plan.device, dtype
        self._made_by = {
            "calibrant": __version__,
            "libraries": library_versions(),
            "device": device.type,
        }
        self._corpora: dict[tuple[str, str], dict[str, Any]] = {}
        self._sets: dict[tuple[Any, ...], SetStep] = {}
        self._yardsticks: dict[str, dict[str, Yardstick]] = {}

    def work(self, cell: Cell) -> CellWork:
        """The steps of a cell."""
        made = self._set(cell)
        yardsticks = self._yardsticks_of(cell.model)
        model, recipe = self._models[cell.model], self._recipes[cell.recipe].with_seed(cell.seed)
        key = sha256_json(
            {
                **self._made_by,
                "dtype": self._dtype,
                "model": model.identity,
                "recipe": recipe.model_dump(mode="json", exclude={"name", "description"}),
                "generator": _generator(model, recipe),
                "set": made.key,
                "samples": cell.samples,
                "repeat": cell.repeat,
            }
        )
        step = CellStep(
            key=key,
            model=str(model.path),
            recipe=recipe,
            set_key=made.key,
            samples=cell.samples,
            seed=cell.seed,
            yardsticks=tuple(yardsticks.values()),
            keep_output=self._plan.keep_outputs,
            device=self._device,
            dtype=self._dtype,
        )
        return CellWork(cell, made, yardsticks, step, sha256_json(model.identity))

    def _set(self, cell: Cell) -> SetStep:
        source = self._plan.sources[cell.source]
        is_nested = not isinstance(source, SelectedSource) or source.is_nested
        samples = max(self._plan.samples) if is_nested else cell.samples
        place = (cell.model, cell.source, cell.draw, samples, cell.length, cell.seed)
        if place not in self._sets:
            self._sets[place] = self._new_set(cell, samples)
        return self._sets[place]

    def _new_set(self, cell: Cell, samples: int) -> SetStep:
        source, model = self._plan.sources[cell.source], self._models[cell.model]
        size = {"draw": cell.draw, "samples": samples, "length": cell.length, "seed": cell.seed}
        texts: list[dict[str, Any]] = []
        given = None
        if isinstance(source, GivenSource):
            given = read_manifest(source.sets[cell.draw]).set_sha256
            identity: dict[str, Any] = {"given": given}
        else:
            corpora = [self._corpus(name, source.field) for name in _locations(source)]
            compared = self._compared(source)
            texts = [*corpora, *compared["leakage"], *compared.get("targets", [])]
            with_model = isinstance(source, GeneratedSource) or source.strategy in WITH_MODEL
            identity = {
                **self._made_by,
                **size,
                "source": source.model_dump(mode="json", exclude=_LOCATIONS),
                "corpora": corpora,
                **compared,
                **_chosen_by(source, self._plan.shards),
                "model": {**model.identity, "dtype": self._dtype} if with_model else None,
                "tokenizer": [model.identity["tokenizer_sha256"], model.identity["chat_templates"]],
                "set_libraries": set_library_versions(),
            }
        return SetStep(
            key=sha256_json(identity),
            model=str(model.path),
            source=source,
            shards=self._plan.shards,
            texts=tuple(texts),
            given=given,
            device=self._device,
            dtype=self._dtype,
            **size,
        )

    def _yardsticks_of(self, label: str) -> dict[str, Yardstick]:
        if label not in self._yardsticks:
            model, plan = self._models[label], self._plan
            found: dict[str, Yardstick] = {name: self._original(model, text) for name, text in plan.texts.items()}
            if plan.tasks is not None:
                found |= {name: self._task(model, name, plan.tasks) for name in plan.tasks.names}
            self._yardsticks[label] = found
        return self._yardsticks[label]

    def _original(self, model: Model, text: Text) -> OriginalStep:
        corpus = self._corpus(text.corpus, text.field)
        identity = {
            **self._made_by,
            "model": model.identity,
            "text": corpus,
            **text.model_dump(include={"protocol", "length", "windows"}),
        }
        return OriginalStep(sha256_json(identity), str(model.path), text, corpus, self._device)

    def _task(self, model: Model, name: str, tasks: Tasks) -> TaskStep:
        files = data_hashes(name, tasks.data)
        identity = {
            **self._made_by,
            "model": model.identity,
            "task": name,
            "data": files or HUB,
            "limit": tasks.limit,
            "lm_eval": version("lm_eval"),
        }
        return TaskStep(sha256_json(identity), str(model.path), name, tasks.data, files, tasks.limit, self._device)

    def _compared(self, source: Source) -> dict[str, Any]:
        """Texts that a selection compares its candidates with."""
        if not isinstance(source, SelectedSource):
            return {"leakage": []}
        leakage = [self._corpus(name, source.filters.leakage_field) for name in source.filters.leakage]
        targets = [self._corpus(name, source.target_field) for name in source.targets]
        return {"leakage": leakage, **({"targets": targets} if targets else {})}

    def _corpus(self, location: str, field: str) -> dict[str, Any]:
        if (location, field) not in self._corpora:
            self._corpora[location, field] = Corpus(location, field).describe()
        return self._corpora[location, field]


def _generator(model: Model, recipe: Recipe) -> dict[str, str] | None:
    """Identity of the other model that a training uses."""
    if recipe.training is None:
        return None
    return generator_identity(ModelFolder(model.path), recipe.training)


def _chosen_by(source: GeneratedSource | SelectedSource, shards: int) -> dict[str, Any]:
    """What else decides a selection: the parts of its corpus, and the files of its embedding."""
    if isinstance(source, GeneratedSource):
        return {}
    folder = Path(source.embedding)
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    embedding = {str(path.relative_to(folder)): sha256_file(path) for path in files}
    return {"shards": None if source.strategy in WITH_DRAWS else shards, "embedding": embedding}


def _locations(source: GeneratedSource | SelectedSource) -> tuple[str, ...]:
    if isinstance(source, SelectedSource):
        return source.corpora
    return () if source.corpus is None else (source.corpus,)
