"""Selection requests: everything that decides a selection's result, as manifests record it."""

import difflib
import math
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from calibrant.calibration.filters.content import scripts
from calibrant.calibration.filters.leakage import DEFAULT_RUN
from calibrant.calibration.generate import DEFAULT_LENGTH
from calibrant.calibration.windows import Policy
from calibrant.errors import CalibrantError

Strategy = Literal[
    "uniform",
    "zipcal",
    "zipf",
    "unigram",
    "words_dataset",
    "perplexity",
    "k-centre",
    "herding",
    "cola",
    "acdm",
    "zipcal-multi",
]
# Other tools' names for a strategy; manifests record ours.
STRATEGY_ALIASES: dict[str, Strategy] = {"k-center": "k-centre"}
StrategyName = Strategy | Literal["k-center"]
# The embedding that needs no model: TF-IDF over normalized sub-words, projected at random.
LEXICAL = "lexical"
# They draw words and choose no text.
OF_WORDS = ("unigram", "words_dataset")
# Draws of these are cut from one permutation; draws of all others see disjoint shards of the corpus.
WITH_DRAWS = ("uniform", *OF_WORDS)
# Rows of the papers' sets; draws this far apart hold nested sets of any size up to it.
DEFAULT_STRIDE = 128
# Words and tokens of a row in the released code of ZipCal.
_WORDS_DATASET_LENGTH = 128
_USED_BY = {
    "stride": WITH_DRAWS,
    "parts": ("zipcal",),
    "pool": ("zipcal", "zipcal-multi"),
    "keep": ("perplexity",),
    "percentile": ("perplexity",),
    "embedding": ("k-centre", "herding", "zipcal-multi"),
    "targets": ("acdm",),
    "target_field": ("acdm",),
}

_Model = TypeVar("_Model", bound=BaseModel)


class FilterRequest(BaseModel):
    """Which documents may become candidates; every filter is off by default.

    Attributes:
        duplicates: "exact" drops documents with the text of an earlier one, "near" also those that share most of it
            (MinHash, Broder 1997).
        min_characters, max_characters: shortest and longest text, both included.
        max_repetition: largest share of runs of ten words that occur earlier in the text.
        script: script of at least half of the letters: the first word of their Unicode names, for example "latin".
        leakage: locations of evaluation texts; documents that share a run of words with them are dropped.
        leakage_field: where the texts are in the rows of ``leakage``.
        leakage_run: length of the run in words; 13 in arXiv 2005.14165, appendix C.
        keep_leaked: only count the documents that ``leakage`` finds.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    duplicates: Literal["keep", "exact", "near"] = "keep"
    min_characters: int = Field(default=0, ge=0)
    max_characters: int | None = Field(default=None, ge=1)
    max_repetition: float | None = Field(default=None, ge=0, le=1)
    script: str | None = None
    leakage: tuple[str, ...] = ()
    leakage_field: str = "text"
    leakage_run: int = Field(default=DEFAULT_RUN, ge=1)
    keep_leaked: bool = False

    @field_validator("script")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        return value if value is None else check_script(value)

    @model_validator(mode="after")
    def _fits(self) -> "FilterRequest":
        if self.max_characters is not None and self.max_characters < self.min_characters:
            raise ValueError(f"no text has at least {self.min_characters} and at most {self.max_characters} characters")
        if not self.leakage and (self.keep_leaked or self.leakage_run != DEFAULT_RUN or self.leakage_field != "text"):
            raise ValueError(
                "leakage run, leakage field and keep leaked say how to find leakage: name its texts with `leakage`"
            )
        return self


class MixRequest(BaseModel):
    """Groups of documents that share a set's rows (ours); by default there are none.

    Attributes:
        scripts: one group per script (see ``FilterRequest``); documents in other scripts are left out.
        lengths: bounds in characters, rising: one group below the first, one between each two, one from the last.
        weights: shares of the groups, equal by default.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    scripts: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()
    weights: tuple[float, ...] | None = None

    @field_validator("scripts")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(check_script, value))

    @model_validator(mode="after")
    def _fits(self) -> "MixRequest":
        if self.scripts and self.lengths:
            raise ValueError("a mix is of scripts or of lengths, not both")
        if len(set(self.scripts)) < len(self.scripts) or list(self.lengths) != sorted({*self.lengths} - {0}):
            raise ValueError("a mix needs different scripts, or lengths above 0 in rising order")
        if self.weights is not None and not (self.scripts or self.lengths):
            raise ValueError("weights of a mix need scripts or lengths to mix")
        groups = len(self.scripts) or len(self.lengths) + bool(self.lengths)
        if self.weights is not None and len(self.weights) != groups:
            raise ValueError(f"{len(self.weights)} weights for the {groups} groups of a mix; give one for each")
        if self.weights is not None:
            check_weights(self.weights)
        return self


def check_script(name: str) -> str:
    """``name``, if it names a script.

    Raises:
        ValueError: no letter's Unicode name begins with it.
    """
    known = scripts()
    if name.upper() not in known:
        near = difflib.get_close_matches(name.upper(), known)
        hint = (
            f"did you mean {' or '.join(near).lower()}?"
            if near
            else "there are latin, cyrillic, greek, arabic, cjk, ..."
        )
        raise ValueError(f"{name}: no script of that name; {hint}")
    return name


def check_weights(weights: tuple[float, ...]) -> None:
    """Refuse weights that are no shares.

    Raises:
        ValueError: one is negative or not finite, or all are 0.
    """
    if not (min(weights, default=-1) >= 0 < sum(weights) < math.inf):
        raise ValueError("weights must be finite and not negative, and at least one above 0")


class SelectionRequest(BaseModel):
    """One selection; a field that the strategy does not use must keep its default.

    Attributes:
        strategy: how candidates are chosen.
            "uniform": at random, non-overlapping draws from one shuffle.
            "zipcal": greedy coverage of sub-words (arXiv 2603.16105, algorithm 1).
            "zipcal-multi": "zipcal" in every corpus, then "k-centre" over its choices (algorithm 2).
            "zipf": the rarest words (released code of ZipCal).
            "unigram": random words of all documents, every row full.
            "words_dataset": the same as the released code of ZipCal makes it: as many words a row as it has tokens (128
            there), cut at the row's end.
            "perplexity": by perplexity under the model; see ``keep``.
            "k-centre": no candidate far from a chosen one (Gonzalez 1985); "k-center" is accepted too.
            "herding": the mean of the chosen is that of all (released code of ZipCal).
            "cola": one candidate per cluster of the model's activations (arXiv 2510.10618, stage 3).
            "acdm": those whose activations are closest to the mean of ``targets`` (after OpenReview pfw3saHzGU).
        windows: how candidates are cut; see ``Cutting``.
        samples: number of rows.
        length: tokens per row.
        seed: seed of every random choice.
        draw: number of the set among the disjoint sets of one seed.
        stride: for "uniform", "unigram" and "words_dataset", the rows between the beginnings of successive draws, at
            least ``samples``; by default 128, or ``samples`` if that is more. Sets of one draw and stride are nested:
            the smaller one is the first rows of the larger one. Several corpora and the groups of a mix share it as
            they share the rows.
        shards: number of disjoint random parts of the corpus, of which draw k sees part k; not for "uniform", "unigram"
            and "words_dataset", whose draws are disjoint anyway.
        parts: random parts in which "zipcal" selects before it selects among their choices (arXiv 1411.0541).
        pool: "zipcal" considers this many random candidates per pick, as its released code does (2,000); all by
            default.
        keep: "perplexity" takes the "lowest", the "middle", or draws among those "below" ``percentile``
            (arXiv 2410.17711).
        percentile: in (0, 100].
        embedding: "lexical", or a sentence-transformers model, for "k-centre", "herding" and "zipcal-multi".
        targets: locations of texts typical of the model's purpose, for "acdm": the first 512 tokens of 100 random ones
            of each, or of all if there are fewer.
        target_field: where the texts are in the rows of ``targets``.
        mask: which tokens count: "all", those an "assistant" wrote, or all but special ones ("no-special").
        weights: shares of several corpora, equal by default.
        mix: groups of documents that share the rows.
        filters: which documents may become candidates.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    strategy: Strategy = "uniform"
    windows: Policy = "pack"
    samples: int = Field(default=128, ge=1)
    length: int = Field(default=DEFAULT_LENGTH, ge=2)
    seed: int = Field(default=0, ge=0)
    draw: int = Field(default=0, ge=0)
    stride: int | None = Field(default=None, ge=1)
    shards: int = Field(default=1, ge=1)
    parts: int = Field(default=1, ge=1)
    pool: int | None = Field(default=None, ge=1)
    keep: Literal["lowest", "middle", "below"] = "below"
    percentile: float = Field(default=80.0, gt=0, le=100)
    embedding: str = LEXICAL
    # Left out where they change nothing, so that manifests of other strategies stay as they were.
    targets: tuple[str, ...] = Field(default=(), exclude_if=lambda targets: not targets)
    target_field: str = Field(default="text", exclude_if=lambda field: field == "text")
    mask: Literal["all", "assistant", "no-special"] = "all"
    weights: tuple[float, ...] | None = None
    mix: MixRequest = MixRequest()
    filters: FilterRequest = FilterRequest()

    @field_validator("strategy", mode="before")
    @classmethod
    def _unaliased(cls, value: Any) -> Any:
        return STRATEGY_ALIASES.get(value, value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _fits(self) -> "SelectionRequest":
        for name, strategies in _USED_BY.items():
            default = type(self).model_fields[name].default
            if vars(self)[name] != default and self.strategy not in strategies:
                known = ", ".join(strategies[:-1]) + " and " * (len(strategies) > 1) + strategies[-1]
                raise ValueError(f"{name} is for {known} only, not for {self.strategy}")
        if self.strategy == "acdm" and not self.targets:
            raise ValueError("acdm looks for texts like others: name texts typical of the model's purpose in `targets`")
        if self.weights is not None and self.strategy == "zipcal-multi":
            raise ValueError("zipcal-multi chooses from all corpora by distance; leave out `weights`")
        if self.weights is not None:
            check_weights(self.weights)
        if self.mix != MixRequest() and (self.strategy == "zipcal-multi" or self.parts > 1):
            raise ValueError("a mix goes with neither zipcal-multi nor parts")
        if self.strategy not in WITH_DRAWS and self.draw >= self.shards:
            raise ValueError(
                f"{self.strategy} has no random draws; draw {self.draw} needs `shards={self.draw + 1}` or more: "
                "disjoint random parts of the corpus, of which draw k sees part k"
            )
        if self.percentile != 80.0 and self.keep != "below":
            raise ValueError(f"percentile goes with keep below, not with keep {self.keep}")
        if self.parts > 1 and (self.shards > 1 or self.pool is not None):
            raise ValueError("parts go with neither shards nor a pool")
        if self.stride is not None and self.stride < self.samples:
            raise ValueError(
                f"draws of {self.samples} samples that begin every {self.stride} rows would overlap: use "
                f"`stride={self.samples}` or more, or fewer samples"
            )
        if self.strategy in WITH_DRAWS and self.shards != 1:
            raise ValueError(f"{self.strategy} draws are disjoint anyway; leave out `shards`")
        if self.mask == "assistant" and (self.strategy in (*OF_WORDS, "zipcal-multi") or self.parts > 1):
            raise ValueError(f"mask assistant does not go with {self.strategy}" + " in parts" * (self.parts > 1))
        if self.strategy in OF_WORDS and self.windows != "pack":
            raise ValueError(f"{self.strategy} draws words, it cuts no windows; leave out `windows`")
        return self

    @property
    def rows_between_draws(self) -> int:
        """``stride``, or its default."""
        return self.stride if self.stride is not None else max(DEFAULT_STRIDE, self.samples)

    def recorded(self) -> dict[str, Any]:
        """The fields that a manifest records under ``parameters``; ``stride`` only for strategies that use it."""
        fields = self.model_dump(mode="json", exclude={"strategy", "samples", "length", "seed", "draw", "stride"})
        return {**fields, "stride": self.rows_between_draws} if self.strategy in WITH_DRAWS else fields


def usual_length(strategy: str) -> int:
    """Tokens per row where nothing else is said: 128 for "words_dataset", as in the released code, else 512."""
    return _WORDS_DATASET_LENGTH if strategy == "words_dataset" else DEFAULT_LENGTH


def selection_request(**fields: Any) -> SelectionRequest:
    """A request from plain values.

    Raises:
        CalibrantError: an option is unknown, out of range or does not fit the others.
    """
    return _validated(SelectionRequest, fields)


def mix_request(**fields: Any) -> MixRequest:
    """A mix from plain values.

    Raises:
        CalibrantError: an option is unknown or does not fit the others.
    """
    return _validated(MixRequest, fields)


def filter_request(**fields: Any) -> FilterRequest:
    """Filters from plain values.

    Raises:
        CalibrantError: an option is unknown or out of range.
    """
    return _validated(FilterRequest, fields)


def _validated(kind: type[_Model], fields: dict[str, Any]) -> _Model:
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        raise CalibrantError(f"{where} {problem['input']!r}: {message}" if where else message) from error
