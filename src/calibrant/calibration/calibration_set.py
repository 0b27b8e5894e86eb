"""The calibration set: token ids, their mask and where they came from, saved with a content hash."""

import contextlib
import functools
import platform
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from calibrant.calibration.token_matrix import token_matrix
from calibrant.errors import CalibrantError, first_line
from calibrant.formats.safetensors_file import save_tensors
from calibrant.hashing import canonical_json, sha256_bytes
from calibrant.modeling.hub import model_path
from calibrant.modeling.token_rows import TokenRows
from calibrant.modeling.tokenizer import Tokenizer
from calibrant.output_folder import check_output, staged
from calibrant.version import __version__

TENSORS_NAME = "tokens.safetensors"
MANIFEST_NAME = "manifest.json"
_LIBRARIES = ("jinja2", "numpy", "pyarrow", "scipy", "tokenizers", "torch", "transformers")
# They decide a result only where they are installed.
_OPTIONAL_LIBRARIES = ("datasets", "protobuf", "sentence-transformers", "sentencepiece", "tiktoken")
# What is counted over a set's rows, where it is not all tokens.
_COUNTS_OF_ROWS = ("classes_covered", "clusters", "generations", "rows_")
EMPTY_ROWS = "rows_without_a_counted_token"
# Ids of four bytes; more than 100,000 rows of 8,192 tokens.
_MOST_TOKENS = 1 << 30


class Segment(BaseModel):
    """A run of tokens of one row taken from one document.

    ``offset`` is the position in the tokenized document, ``start`` the position in the row, both in tokens.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    document: str
    offset: int = Field(ge=0)
    start: int = Field(ge=0)
    length: int = Field(ge=0)


class _CorpusIdentity(BaseModel):
    """What every entry of ``Manifest.corpora``, ``evaluations`` and ``targets`` holds."""

    model_config = ConfigDict(extra="allow", strict=True)

    kind: str
    name: str
    field: str = "text"
    files: dict[str, str] | None = None


class _CorpusRecord(_CorpusIdentity):
    rows: int = Field(ge=0)


def _each(model: type[BaseModel]) -> AfterValidator:
    """Validates every entry of a list by ``model``, and keeps it as it is."""

    def check(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for entry in entries:
            model.model_validate(entry)
        return entries

    return AfterValidator(check)


class Manifest(BaseModel):
    """Where a calibration set came from, and its hash.

    Attributes:
        strategy: how the set was made; ``parameters`` are the strategy's options.
        tokenizer_sha256: hash of the tokenizer's definition, "" if the tokenizer is unknown. Models with another
            tokenizer are refused.
        tokenizer_files_sha256: hash of the tokenizer's files; where it is equal, the tokenizer need not be read.
        corpora: identity of every corpus (``Corpus.describe``) and its number of rows.
        model: identity of the model that wrote or scored text.
        evaluations: identity of the texts that were searched for as leakage.
        targets: identity of the texts that candidates were compared with.
        embedding_sha256: hash of the sentence encoder's folder.
        chat_template_sha256: hash of the chat template, if conversations went through it.
        chat_template_date: the date that the chat template is given, whatever the day.
        locations: the model and the corpora as the caller named them.
        versions: versions of the libraries that decide the result.
        rows: segments of every row; empty if no corpus was read. With several corpora, a segment's document begins with
            the corpus's number.
        counts: numbers of documents, candidates and tokens that were read, dropped and used.
        head_of: the set is the first ``samples`` rows of one of this many rows, which is what ``parameters``, seed and
            draw make, and whose documents and candidates ``counts`` counts; None if it was made as it is.
        set_sha256: hash of shape, token ids and mask.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: int = 1
    strategy: str
    parameters: dict[str, Any]
    seed: int = Field(ge=0)
    draw: int = Field(ge=0)
    samples: int = Field(ge=1)
    length: int = Field(ge=1)
    tokenizer_sha256: str
    tokenizer_files_sha256: str | None = None
    corpora: Annotated[list[dict[str, Any]], _each(_CorpusRecord)] = []
    model: dict[str, str] | None = None
    evaluations: Annotated[list[dict[str, Any]], _each(_CorpusIdentity)] = []
    targets: Annotated[list[dict[str, Any]], _each(_CorpusIdentity)] = []
    embedding_sha256: str | None = None
    chat_template_sha256: str | None = None
    chat_template_date: str | None = None
    locations: dict[str, list[str]] = {}
    versions: dict[str, str] = {}
    rows: list[list[Segment]] = []
    counts: dict[str, int] = {}
    head_of: int | None = None
    set_sha256: str = ""

    @model_validator(mode="after")
    def _is_of_a_size(self) -> "Manifest":
        rows = self.samples if self.head_of is None else self.head_of
        if rows < self.samples:
            raise ValueError(f"the first {self.samples} of {rows} rows")
        if rows * self.length > _MOST_TOKENS:
            raise ValueError(f"{rows} samples of {self.length} tokens are more than {_MOST_TOKENS:,} tokens")
        return self


def read_manifest(path: str | Path) -> Manifest:
    """The manifest at ``path``, a file or a set's folder.

    Raises:
        CalibrantError: there is no readable manifest.
    """
    file = Path(path) / MANIFEST_NAME if Path(path).is_dir() else Path(path)
    try:
        manifest = Manifest.model_validate_json(file.read_bytes(), strict=True)
        canonical_json(manifest.model_dump()).encode()  # refuses numbers and texts that cannot be written
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"]) or "its JSON"
        said = problem["msg"].removeprefix("Value error, ").splitlines()[0]
        raise CalibrantError(f"{file}: not a calibration manifest ({where}: {said})") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CalibrantError(f"{file}: not a calibration manifest ({first_line(error)})") from error
    return manifest


def set_hash(tokens: torch.Tensor, mask: torch.Tensor) -> str:
    """SHA-256 over the shape, the little-endian int32 token ids and the 0/1 mask bytes."""
    shape = np.asarray(tokens.shape, dtype="<i8").tobytes()
    return sha256_bytes(shape, tokens.numpy().astype("<i4").tobytes(), mask.numpy().astype("u1").tobytes())


@dataclass(frozen=True)
class CalibrationSet:
    """Token ids ``[samples, length]`` (int32), a mask of the same shape (bool; True: this token counts), a manifest."""

    tokens: torch.Tensor
    mask: torch.Tensor
    manifest: Manifest

    @classmethod
    def build(cls, tokens: torch.Tensor, mask: torch.Tensor, manifest: Manifest) -> "CalibrationSet":
        """Make a set and fill in the manifest's hash and counts of tokens.

        Raises:
            CalibrantError: tokens and mask are not of one shape ``[samples, length]``, or empty.
        """
        tokens, mask = tokens.to(torch.int32).contiguous(), mask.to(torch.bool).contiguous()
        if tokens.ndim != 2 or tokens.shape != mask.shape or tokens.numel() == 0:
            raise CalibrantError(
                f"a calibration set needs token ids and a mask of one shape [samples, length], "
                f"got {list(tokens.shape)} and {list(mask.shape)}"
            )
        counts = {**manifest.counts, "tokens": tokens.numel(), "masked_tokens": int((~mask).sum())}
        return cls(tokens, mask, manifest.model_copy(update={"counts": counts, "set_sha256": set_hash(tokens, mask)}))

    @property
    def rows(self) -> TokenRows:
        """Token ids and mask as the blocks of a model take them."""
        return TokenRows(self.tokens, self.mask)

    @property
    def sha256(self) -> str:
        """The set's content hash."""
        return self.manifest.set_sha256

    @classmethod
    def from_tokens(
        cls, ids: Any, mask: Any = None, tokenizer: str | Path | Tokenizer | PreTrainedTokenizerBase | None = None
    ) -> "CalibrationSet":
        """Make a set of given token ids.

        Args:
            ids: a tensor, an array or a list of lists of equal length, integers ``[rows, length]``; or a
                ``DataLoader`` or another iterable of batches. A batch is a tensor, or a dict with "input_ids" and
                optionally "attention_mask", all ``[rows, length]`` or ``[length]``; "labels" are ignored. Tokens that
                the attention mask leaves out are dropped, shorter rows are padded at the end, and padding does not
                count.
            mask: of the shape of ``ids``; true (or 1) for tokens that count. By default all do. Not for batches.
            tokenizer: the tokenizer of the ids: a model folder or an object. With it, ``compress`` refuses models with
                another tokenizer; without it, only ids outside the model's vocabulary.

        Raises:
            CalibrantError: ids are no integers or negative, the rows of a list have different lengths, the mask has
                another shape, or no token counts.
        """
        tokens, counted = token_matrix(ids, mask)
        known = _opened(tokenizer)
        has_folder = not isinstance(tokenizer, PreTrainedTokenizerBase)
        manifest = Manifest(
            strategy="tokens",
            parameters={"mask": "all" if bool(counted.all()) else "given"},
            seed=0,
            draw=0,
            samples=tokens.shape[0],
            length=tokens.shape[1],
            tokenizer_sha256=known.sha256 if known is not None else "",
            tokenizer_files_sha256=known.files_sha256 if known is not None and has_folder else None,
        )
        folder = str(tokenizer) if isinstance(tokenizer, str | Path) else None
        return cls.build(tokens, counted, manifest).with_origin(folder, [])

    def with_origin(self, model: str | None, corpora: list[str]) -> "CalibrationSet":
        """The set with the locations of its inputs and the versions of the libraries, to make it again."""
        locations = {**({"model": [model]} if model else {}), **({"corpora": corpora} if corpora else {})}
        versions = {"calibrant": __version__, "python": platform.python_version(), **set_library_versions()}
        manifest = self.manifest.model_copy(update={"locations": locations, "versions": versions})
        return CalibrationSet(self.tokens, self.mask, manifest)

    def head(self, samples: int) -> "CalibrationSet":
        """The first ``samples`` rows, as a set of its own.

        Heads of one set are nested, whatever made it. With several corpora or a mix the first rows are those of the
        first corpus or group. The manifest says of how many rows the set is the head (``head_of``), and ``rebuild``
        makes those and takes the head again; counts that only hold for all rows are left out.

        Raises:
            CalibrantError: the set has fewer rows, or no token of the first ones counts.
        """
        whole = self.manifest
        if not 1 <= samples <= whole.samples:
            raise CalibrantError(f"the first {samples} rows of a set of {whole.samples}: use 1 to {whole.samples}")
        if samples == whole.samples:
            return self
        tokens, mask = self.tokens[:samples], self.mask[:samples]
        if not bool(mask.any()):
            raise CalibrantError(f"no token of the set's first {samples} rows counts; take more rows or another mask")
        corpora, before = [], 0
        for corpus in whole.corpora:
            corpora.append({**corpus, "rows": min(max(samples - before, 0), corpus["rows"])})
            before += corpus["rows"]
        counts = {name: count for name, count in whole.counts.items() if not name.startswith(_COUNTS_OF_ROWS)}
        empty = int((~mask.any(1)).sum())
        changed = {
            "samples": samples,
            "head_of": whole.head_of or whole.samples,
            "corpora": corpora,
            "rows": whole.rows[:samples],
            "counts": {**counts, **({EMPTY_ROWS: empty} if empty else {})},
        }
        return CalibrationSet.build(tokens, mask, whole.model_copy(update=changed))

    def __repr__(self) -> str:
        made = self.manifest
        rows, length = self.tokens.shape
        return f"CalibrationSet({made.strategy}, {rows} rows of {length} tokens, {made.set_sha256[:12]})"

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write ``tokens.safetensors`` and ``manifest.json`` into ``folder``; equal sets give equal bytes.

        The folder appears complete or not at all. ``overwrite`` replaces an earlier output of Calibrant.

        Raises:
            CalibrantError: the folder exists and is not empty, or it cannot be written.
        """
        with staged(check_output(folder, overwrite), overwrite) as staging:
            save_tensors(
                {"tokens": self.tokens, "mask": self.mask.to(torch.uint8)},
                staging / TENSORS_NAME,
                {"calibrant.set_sha256": self.sha256},  # the writer orders several entries at random
            )
            (staging / MANIFEST_NAME).write_text(canonical_json(self.manifest.model_dump()), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> "CalibrationSet":
        """Read a saved set and check its hash.

        Raises:
            CalibrantError: a file is missing or unreadable, or the tokens do not have the manifest's hash.
        """
        folder = Path(folder)
        for name in (TENSORS_NAME, MANIFEST_NAME):
            if not (folder / name).is_file():
                raise CalibrantError(
                    f"{folder}: not a calibration set, {name} is missing; calibrant data select and generate make sets"
                )
        manifest = read_manifest(folder)
        try:
            tensors = load_file(folder / TENSORS_NAME)
            tokens, mask = tensors["tokens"], tensors["mask"]
        except Exception as error:  # damaged headers make the library raise many unrelated classes
            raise CalibrantError(f"{folder / TENSORS_NAME}: unreadable ({first_line(error)})") from error
        shape = (manifest.samples, manifest.length)
        if tokens.dtype != torch.int32 or mask.dtype != torch.uint8 or not tokens.shape == mask.shape == shape:
            raise CalibrantError(f"{folder / TENSORS_NAME}: not int32 tokens and a uint8 mask of shape {list(shape)}")
        if set_hash(tokens, mask) != manifest.set_sha256:
            raise CalibrantError(
                f"{folder}: the tokens do not match the hash in {MANIFEST_NAME}; the set was changed, make it again"
            )
        if int(tokens.min()) < 0:
            raise CalibrantError(f"{folder / TENSORS_NAME}: token ids range from {tokens.min()}; need at least 0")
        return cls.build(tokens, mask, manifest)


def set_library_versions() -> dict[str, str]:
    """Versions of the libraries that decide a set, those that are not installed left out."""
    return dict(_set_library_versions())


@functools.cache  # reading what is installed takes as long as checking a source of a study
def _set_library_versions() -> dict[str, str]:
    found = {name: version(name) for name in _LIBRARIES}
    for name in _OPTIONAL_LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _opened(tokenizer: str | Path | Tokenizer | PreTrainedTokenizerBase | None) -> Tokenizer | None:
    if tokenizer is None or isinstance(tokenizer, Tokenizer):
        return tokenizer
    if isinstance(tokenizer, str | Path):
        return Tokenizer(model_path(tokenizer))
    with tempfile.TemporaryDirectory(prefix="calibrant-tokenizer-") as folder:
        tokenizer.save_pretrained(folder)
        return Tokenizer(folder)
