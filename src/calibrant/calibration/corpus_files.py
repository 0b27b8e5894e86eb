"""Which files of a folder are data."""

import re
from pathlib import Path

from calibrant.errors import CalibrantError

_TEXT_SUFFIXES = {".txt", ".text", ".md", ".raw", ".utf8"}
_SUFFIXES = _TEXT_SUFFIXES | {".jsonl", ".parquet"}
# What data sets keep beside their data, as text files.
_CARD = re.compile(
    r"([\d_. -]*readme|(un)?licen[cs]es?|copying|notices?|citation|changelog|contributing|authors|security"
    r"|code_of_conduct|dataset_card)([^a-z].*)?"
    r"|requirements([^a-z].*)?\.txt|(.*[^a-z])?(check|ck|md5|b2|sha\d*)?sums\.txt"
)


def suffix_of(path: Path) -> str:
    """The lower-case suffix that says what a file holds, without ``.gz``."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def readable_files(root: Path) -> tuple[list[Path], list[Path]]:
    """The files of a corpus, and the text files of its folder that are no data.

    Raises:
        CalibrantError: there is no such file or folder, or none of its files can be read.
    """
    if root.is_file():
        if suffix_of(root) not in _SUFFIXES:
            raise CalibrantError(
                f"{root}: unknown kind of text file, expected .txt, .jsonl or .parquet (or .gz of these)"
            )
        return [root], []
    if not root.is_dir():
        raise CalibrantError(f"{root}: no such text file or folder (a hub data set is written hub:owner/name)")
    files = sorted(p for p in root.rglob("*") if p.is_file() and suffix_of(p) in _SUFFIXES and not _is_hidden(p, root))
    cards = [path for path in files if _is_card(path)]
    data = [path for path in files if not _is_card(path)]
    if not data:
        besides = f" besides {cards[0].name}, which is no data unless it is named itself" if cards else ""
        raise CalibrantError(f"{root}: the folder contains no .txt, .jsonl or .parquet file (or .gz of these){besides}")
    return data, cards


def _is_hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in path.relative_to(root).parts)


def _is_card(path: Path) -> bool:
    return suffix_of(path) in _TEXT_SUFFIXES and _CARD.fullmatch(path.name.lower()) is not None


def check_name(path: Path) -> None:
    """Refuse a path that no manifest can name.

    Raises:
        CalibrantError: it is not UTF-8.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise CalibrantError(f"{str(path)!a}: the file's name is not UTF-8, so no manifest can name it") from error
