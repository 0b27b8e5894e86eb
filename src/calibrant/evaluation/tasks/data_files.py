"""Which tasks there are, where a data folder holds their rows, and how rows become those of the hub's data sets."""

import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from calibrant.calibration.packed import unpacked
from calibrant.errors import CalibrantError

HUB = "hub:"
_LONGEST_LINE_BYTES = 1 << 20
Row = dict[str, Any]


@dataclass(frozen=True)
class TaskFiles:
    """A task of lm-eval and its rows in a data folder.

    ``definition`` is the folder of its definition below lm-eval's ``tasks``. ``splits`` gives the file of each split
    that the definition reads, without its suffix ``.jsonl`` or ``.jsonl.gz``. ``adapt`` makes the hub's row of the
    file's row and its number from 0.
    """

    definition: str
    splits: dict[str, str]
    adapt: Callable[[Row, int], Row]


def _columns(*names: str) -> Callable[[Row, int], Row]:
    """The file has the hub's columns; further ones are left out."""
    return lambda row, _: {name: row[name] for name in names}


def _boolq(row: Row, number: int) -> Row:
    """The hub has the answer as a label: 0 for no, 1 for yes."""
    return {"question": row["question"], "passage": row["passage"], "idx": number, "label": int(row["answer"])}


def _lambada(row: Row, number: int) -> Row:
    """The hub has the whole passage, of which lm-eval splits off the last word."""
    return {"text": f"{row['context']} {row['continuation']}"}


_ARC = _columns("id", "question", "choices", "answerKey")

TASKS: dict[str, TaskFiles] = {
    "arc_easy": TaskFiles("arc", {"test": "arc_easy/test"}, _ARC),
    "arc_challenge": TaskFiles("arc", {"test": "arc_challenge/test"}, _ARC),
    "boolq": TaskFiles("super_glue/boolq", {"validation": "boolq/validation"}, _boolq),
    "hellaswag": TaskFiles(
        "hellaswag",
        {"validation": "hellaswag/validation"},
        _columns(
            "ind", "activity_label", "ctx_a", "ctx_b", "ctx", "endings", "source_id", "split", "split_type", "label"
        ),
    ),
    "lambada_openai": TaskFiles("lambada", {"test": "lambada/lambada_openai_test"}, _lambada),
    "openbookqa": TaskFiles(
        "openbookqa", {"test": "openbookqa/test"}, _columns("id", "question_stem", "choices", "answerKey")
    ),
    "piqa": TaskFiles("piqa", {"validation": "piqa/validation"}, _columns("goal", "sol1", "sol2", "label")),
    "rte": TaskFiles("glue/rte", {"validation": "rte/validation"}, _columns("sentence1", "sentence2", "label", "idx")),
    "winogrande": TaskFiles(
        "winogrande", {"validation": "winogrande/validation"}, _columns("sentence", "option1", "option2", "answer")
    ),
    "copa": TaskFiles(
        "super_glue/copa",
        {"validation": "copa/validation"},
        _columns("premise", "choice1", "choice2", "question", "idx", "label"),
    ),
    "gsm8k": TaskFiles("gsm8k", {"train": "gsm8k/train", "test": "gsm8k/test"}, _columns("question", "answer")),
    "mmlu": TaskFiles(
        "mmlu/default", {"dev": "mmlu/dev", "test": "mmlu/test"}, _columns("question", "subject", "choices", "answer")
    ),
}


def check_tasks(names: Sequence[str], data: str | Path | None) -> None:
    """Refuse tasks that cannot run, before anything is loaded.

    Raises:
        CalibrantError: a task is unknown or named twice, no data is given, a file is missing, or lm-eval is not
            installed.
    """
    for name in names:
        if name not in TASKS:
            raise CalibrantError(f"{name}: no such task; there are {', '.join(sorted(TASKS))}")
    if len(set(names)) < len(names):
        raise CalibrantError(f"{', '.join(names)}: a task is named twice in `tasks`")
    if find_spec("lm_eval") is None:
        raise CalibrantError("tasks need the extra: pip install 'calibrant[evaluation]'")
    if not names or str(data) == HUB:
        return
    if data is None:
        raise CalibrantError(
            f'{names[0]}: no data; name the folder of the tasks\' files with `data`, or load them with `data="{HUB}"`'
        )
    if not Path(data).is_dir():
        raise CalibrantError(f"{data}: no such folder; `data` is the folder of the tasks' files, or {HUB}")
    for name in names:
        task_files(name, Path(data))


def read_split(name: str, split: str, data: Path) -> list[Row]:
    """Rows of a split of the task ``name``, with the hub's columns; none for a split that the task does not need.

    Raises:
        CalibrantError: the file is missing, damaged or lacks a column.
    """
    stem = TASKS[name].splits.get(split)
    if stem is None:
        return []
    path = _file(data, stem, name)
    return [_adapted(name, row, number, path) for number, row in enumerate(_json_lines(path))]


def task_files(name: str, data: Path) -> list[Path]:
    """The files in ``data`` that the task ``name`` reads.

    Raises:
        CalibrantError: one is missing.
    """
    return [_file(data, stem, name) for stem in TASKS[name].splits.values()]


def _file(data: Path, stem: str, name: str) -> Path:
    plain = data / f"{stem}.jsonl"
    found = next((path for path in (plain, plain.with_name(f"{plain.name}.gz")) if path.is_file()), None)
    if found is None:
        raise CalibrantError(
            f"{plain}: no such file (nor {plain.name}.gz), and the task {name} reads its items from it"
        )
    return found


def _json_lines(path: Path) -> Iterator[Any]:
    with path.open("rb") as raw:
        stream = unpacked(path, raw) if path.suffix == ".gz" else raw
        number = 0
        try:
            while line := stream.readline(_LONGEST_LINE_BYTES):
                number += 1
                yield json.loads(line)
        except (ValueError, RecursionError, EOFError, OSError, zlib.error) as error:
            raise CalibrantError(f"{path}, line {number}: not JSON Lines ({error}); copy the file again") from error


def _adapted(name: str, row: Any, number: int, path: Path) -> Row:
    place, hint = f"{path}, line {number + 1}: not a row of {name}", "see the columns of its hub data set"
    if not isinstance(row, dict):
        raise CalibrantError(f"{place}, but a {type(row).__name__}; {hint}")
    try:
        found = TASKS[name].adapt(row, number)
    except KeyError as error:
        raise CalibrantError(f"{place}: it lacks {error}; {hint}") from error
    except (TypeError, ValueError) as error:
        raise CalibrantError(f"{place} ({error}); {hint}") from error
    empty = next((column for column, value in found.items() if value in (None, [], {})), None)
    if empty is not None:
        raise CalibrantError(f"{place}: its {empty} is empty; {hint}")
    return found
