"""What a study's YAML file says: models, sources, draws, sizes, recipes, and what the results are measured on."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, PrivateAttr, Tag, ValidationError, field_validator, model_validator

from calibrant.calibration.corpus import BUILTIN
from calibrant.calibration.corpus_sources import HUB
from calibrant.calibration.generate import SOURCES
from calibrant.calibration.selection.request import LEXICAL, FilterRequest, MixRequest, StrategyName
from calibrant.calibration.sources.answers import AnswersMask
from calibrant.calibration.sources.self_calibration import FirstTokens
from calibrant.calibration.windows import Policy
from calibrant.errors import CalibrantError
from calibrant.evaluation.text import PAPERS_LENGTH
from calibrant.modeling.hub import DEMO
from calibrant.strict import Strict
from calibrant.yaml_file import parse_yaml, read_yaml_file

# A label names rows of tables and marks of plots.
_LABEL = r"^[A-Za-z0-9][A-Za-z0-9._:@+-]{0,79}$"
_MOST = 10_000
# What pydantic puts among the keys: the kind of a source, and the alternatives of a value.
_NO_KEY = re.compile(r"(generated|selected|given|\[key\])$|literal\[")
# Lists, or one value alone, that name no value twice.
_DIFFERENT = ("samples", "length", "seeds", "models", "recipes")
_WITH_PATHS = ("models", "sources", "recipes", "texts", "tasks")
Label = Annotated[str, Field(pattern=_LABEL)]
_Count = Annotated[int, Field(ge=1, le=1_000_000)]


class Temperature(Strict):
    """Temperatures of a generation; see ``TemperatureSchedule``."""

    initial: float = Field(default=1.0, ge=0)
    final: float = Field(default=1.0, ge=0)
    steps: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _starts(self) -> "Temperature":
        if "initial" in self.model_fields_set and self.initial != self.final and self.steps == 0:
            raise ValueError("initial has no effect without steps; the paper's grid has steps: 10")
        return self


class GeneratedSource(Strict):
    """A source that a model writes, or random tokens; the fields are those of ``generate``."""

    strategy: Literal["self", "llm-qat", "prefix", "answers", "vocabulary"]
    temperature: Temperature | None = None
    first_tokens: FirstTokens = "any"
    corpus: str | None = None
    field: str = "text"
    percentile: float = Field(default=80.0, gt=0, le=100)
    # Left out where it changes nothing, so that sets from before it was a field keep their keys.
    mask: AnswersMask = Field(default="all", exclude_if=lambda mask: mask == "all")


class SelectedSource(Strict):
    """A source that is selected from texts; the fields are those of ``select``.

    ``corpus`` is one location or several.
    """

    corpus: str | tuple[str, ...]
    field: str = "text"
    strategy: StrategyName = "uniform"
    windows: Policy = "pack"
    pool: int | None = Field(default=None, ge=1)
    keep: Literal["lowest", "middle", "below"] = "below"
    percentile: float = Field(default=80.0, gt=0, le=100)
    embedding: str = LEXICAL
    # Left out where they change nothing, so that sets from before they were fields keep their keys.
    targets: tuple[str, ...] = Field(default=(), exclude_if=lambda targets: not targets)
    target_field: str = Field(default="text", exclude_if=lambda field: field == "text")
    mask: Literal["all", "assistant", "no-special"] = "all"
    weights: tuple[float, ...] | None = None
    mix: MixRequest = MixRequest()
    filters: FilterRequest = FilterRequest()

    @field_validator("corpus")
    @classmethod
    def _named(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not value:
            raise ValueError("name at least one")
        if not isinstance(value, str) and len(set(value)) < len(value):
            raise ValueError("names a corpus twice; its share is one of `weights`")
        return value

    @property
    def corpora(self) -> tuple[str, ...]:
        """The locations."""
        return (self.corpus,) if isinstance(self.corpus, str) else self.corpus

    @property
    def is_nested(self) -> bool:
        """Whether the first rows of a set are such a set.

        They are not of clusters, of the middle of a ranking, and of several corpora or groups.
        """
        is_ranked = self.strategy == "perplexity" and self.keep == "middle"
        return self.strategy != "cola" and not is_ranked and len(self.corpora) == 1 and self.mix == MixRequest()


class GivenSource(Strict):
    """A source of saved calibration sets: draw k is the k-th."""

    sets: Annotated[tuple[str, ...], Field(min_length=1, max_length=_MOST)]


def _kind(value: Any) -> str:
    found = vars(value) if isinstance(value, Strict) else value if isinstance(value, Mapping) else {}
    if "sets" in found:
        return "given"
    return "generated" if found.get("strategy") in SOURCES else "selected"


Source = Annotated[
    Annotated[GivenSource, Tag("given")]
    | Annotated[GeneratedSource, Tag("generated")]
    | Annotated[SelectedSource, Tag("selected")],
    Discriminator(_kind),
]


class Text(Strict):
    """A held-out text: its first ``windows`` windows.

    ``protocol`` "windows" cuts windows of ``length`` tokens of a corpus; "wikitext" reads WikiText's raw file as the
    papers do, in windows of 2,048 tokens or the model's context, whatever ``length`` says.
    """

    corpus: str
    field: str = "text"
    protocol: Literal["windows", "wikitext"] = "windows"
    length: int = Field(default=512, ge=2)
    windows: int = Field(default=32, ge=1)

    @property
    def most_tokens(self) -> int:
        """Tokens of all windows, at most."""
        return self.windows * (self.length if self.protocol == "windows" else PAPERS_LENGTH)


class Tasks(Strict):
    """Tasks of lm-eval, see ``evaluate``: ``limit`` items of each, from the files in ``data`` or from "hub:"."""

    names: Annotated[tuple[Label, ...], Field(min_length=1)]
    data: str
    limit: int | None = Field(default=None, ge=1)

    @field_validator("names", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


class StudyPlan(Strict):
    """A grid of runs and what is measured of each.

    Attributes:
        name: names the study's folder.
        description: what the study asks.
        models: model folders, ``hub:owner/name`` or "demo".
        sources: calibration data by label.
        draws: independent sets of every source.
        most_draws: draws that the corpora are divided for where draws are disjoint parts of a corpus; as many more can
            be added later without making earlier ones again. By default 10, or ``draws`` if that is more.
        samples: rows of the sets. The first rows of the largest are taken, so that sets of growing size are nested; of
            clusters (cola), several corpora or a mix every size is made for itself.
        length: tokens per row.
        recipes: names of recipes, or recipe files, which end in .yaml.
        texts: held-out texts by label, for perplexity and divergence.
        tasks: tasks, for accuracy.
        seeds: seeds of sets and trainings.
        repeat: run one cell of every recipe twice, which measures the noise of the implementation.
        keep_outputs: keep the compressed models in the cache after they are measured.
        dtype: of the forward passes of compression and generation.
        device: where everything runs.
    """

    name: Label
    description: str = ""
    models: Annotated[tuple[str, ...], Field(min_length=1, max_length=_MOST)]
    sources: Annotated[dict[Label, Source], Field(min_length=1, max_length=_MOST)]
    draws: int = Field(default=5, ge=1, le=_MOST)
    most_draws: int | None = Field(default=None, ge=1, le=_MOST)
    samples: Annotated[tuple[_Count, ...], Field(min_length=1)] = (128,)
    length: Annotated[tuple[Annotated[int, Field(ge=2, le=1_000_000)], ...], Field(min_length=1)] = (512,)
    recipes: Annotated[tuple[str, ...], Field(min_length=1, max_length=_MOST)]
    texts: Annotated[dict[Label, Text], Field(default_factory=dict, max_length=_MOST)]
    tasks: Tasks | None = None
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1, max_length=_MOST)] = (0,)
    repeat: bool = True
    keep_outputs: bool = False
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = "cpu"
    _written: "StudyPlan | None" = PrivateAttr(default=None)

    @property
    def as_written(self) -> "StudyPlan":
        """The plan with its paths as its file has them."""
        if self._written is None:
            return self
        changed = {name: value for name, value in self if name not in _WITH_PATHS}
        return self._written.model_copy(update=changed)

    @field_validator(*_DIFFERENT, mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, int | str) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _fits(self) -> "StudyPlan":
        for name, values in self:
            if name in _DIFFERENT and len(set(values)) < len(values):
                raise ValueError(f"{name} names one value twice")
        if not self.texts and self.tasks is None:
            raise ValueError("a study needs texts or tasks to measure its models on")
        if self.tasks is not None and set(self.tasks.names) & set(self.texts):
            raise ValueError("a text has the name of a task; call the text something else")
        if self.most_draws is not None and self.most_draws < self.draws:
            raise ValueError(f"most_draws is {self.most_draws}, fewer than the {self.draws} draws")
        for label, source in self.sources.items():
            if not isinstance(source, GivenSource):
                continue
            if len(source.sets) < self.draws:
                raise ValueError(f"source {label} names {len(source.sets)} of {self.draws} sets: one for each draw")
            if len(set(source.sets)) < len(source.sets) or len(self.seeds) > 1:
                raise ValueError(f"source {label} would count a set more than once: name each once, and one seed")
        return self

    @property
    def shards(self) -> int:
        """Disjoint parts of a corpus for selections without random draws."""
        return self.most_draws or max(10, self.draws)


def load_study_plan(path: str | Path) -> StudyPlan:
    """Read a study's YAML file; relative paths in it start at its folder.

    Raises:
        CalibrantError: the file cannot be read, or a key or value is wrong; the message names the key.
    """
    file = Path(path)
    written = _validate(parse_yaml(read_yaml_file(file, "study"), str(file), "study"), str(file))
    plan = _rooted(written, file.parent)
    plan._written = written
    return plan


def _validate(value: object, origin: str) -> StudyPlan:
    try:
        return StudyPlan.model_validate(value)
    except ValidationError as error:
        first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
        place = ".".join(part for part in map(str, first["loc"]) if not _NO_KEY.match(part))
        raise CalibrantError(f"{origin}: {place or 'the study'}: {_said(first['type'], first['msg'])}") from error


def _said(kind: str, message: str) -> str:
    """Pydantic's message, replaced where ours is clearer."""
    if kind == "extra_forbidden":
        return "no such key"
    if kind == "model_type":
        return "expected keys with values"
    if kind == "string_pattern_mismatch":
        return "use letters, digits and . _ : @ + -, at most 80 of them, a letter or digit first"
    if kind == "too_short":
        return "name at least one"
    if kind == "tuple_type":
        return "expected a list"
    if kind == "dict_type":
        return "expected keys with values"
    return message.removeprefix("Value error, ")


def _rooted(plan: StudyPlan, folder: Path) -> StudyPlan:
    """The plan with its relative paths made to start at ``folder``."""

    def place(name: str, *names: str) -> str:
        return name if name in names or name.startswith(HUB) else str(folder / Path(name).expanduser())

    def source(one: Source) -> Source:
        if isinstance(one, GivenSource):
            return one.model_copy(update={"sets": tuple(map(place, one.sets))})
        if isinstance(one, SelectedSource):
            leakage = tuple(place(name, BUILTIN) for name in one.filters.leakage)
            filters = one.filters.model_copy(update={"leakage": leakage})
            corpora = tuple(place(name, BUILTIN) for name in one.corpora)
            is_folder = (folder / Path(one.embedding).expanduser()).is_dir()
            embedding = place(one.embedding) if is_folder else one.embedding
            targets = tuple(place(name, BUILTIN) for name in one.targets)
            update = {"corpus": corpora, "filters": filters, "embedding": embedding, "targets": targets}
            return one.model_copy(update=update)
        return one.model_copy(update={"corpus": None if one.corpus is None else place(one.corpus, BUILTIN)})

    def text(one: Text) -> Text:
        return one.model_copy(update={"corpus": place(one.corpus, BUILTIN)})

    return plan.model_copy(
        update={
            "models": tuple(place(name, DEMO) for name in plan.models),
            "recipes": tuple(place(name) if name.endswith((".yaml", ".yml")) else name for name in plan.recipes),
            "sources": {label: source(one) for label, one in plan.sources.items()},
            "texts": {label: text(one) for label, one in plan.texts.items()},
            "tasks": plan.tasks and plan.tasks.model_copy(update={"data": place(plan.tasks.data)}),
        }
    )
