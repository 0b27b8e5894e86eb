"""lm-eval's own tasks, reading their documents from a data folder."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import lm_eval.tasks
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml

from calibrant.errors import CalibrantError, first_line
from calibrant.evaluation.tasks.data_files import HUB, TASKS, Row, read_split

# lm-eval draws the examples of few-shot prompts with this seed unless told otherwise.
_FEW_SHOT_SEED = 1234
_EXAMPLES, _EVALUATED = ("train", "dev"), ("validation", "test")


@contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """Suppress lm-eval's warnings and the progress bars that it cannot turn off."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        logger.setLevel(before)


def load_tasks(name: str, data: str | Path, limit: int | None = None) -> list[ConfigurableTask]:
    """lm-eval's task ``name``, or the tasks of the group ``name`` in the order of their names.

    Prompts, choices, targets, metrics and few-shot examples are those of the installed lm-eval; only where documents
    come from is replaced, unless ``data`` is "hub:". Of files, only the first ``limit`` items are kept of each task.

    Raises:
        CalibrantError: a file of the data folder does not fit, or the hub does not give a data set.
    """
    root = Path(lm_eval.tasks.__file__).parent
    with quiet_lm_eval():
        manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=str(root / TASKS[name].definition))
        members = [name] if name not in manager.all_groups else _members(manager, name)
        if str(data) == HUB:
            changes = [_revision(manager, member) for member in members]
        else:
            rows = {split: read_split(name, split, Path(data)) for split in (*_EXAMPLES, *_EVALUATED)}
            changes = [
                {"custom_dataset": _documents(rows, _subject(manager, member), limit, f"{data}: {name}")}
                for member in members
            ]
        # A group of one's own is lm-eval's way to change a registered definition.
        specs = [{"task": member, **change} for member, change in zip(members, changes, strict=True)]
        try:
            found = manager.load([{"group": "calibrant", "task": specs}])["tasks"]
        except CalibrantError:
            raise
        except Exception as error:  # lm-eval and datasets raise any class for documents that do not fit
            raise CalibrantError(f"{data}: the task {name} cannot be made of it ({first_line(error)})") from error
    tasks = [found[member] for member in members]
    for task in tasks:
        task.set_fewshot_seed(_FEW_SHOT_SEED)
    return tasks


def _members(manager: Any, group: str) -> list[str]:
    return sorted(task for task in manager.all_subtasks if task.startswith(f"{group}_"))


def _subject(manager: Any, member: str) -> str | None:
    """The subject of a task that reads a part of its group's rows (MMLU)."""
    config = manager.task_index[member].cfg
    return str(config["dataset_name"]) if member.startswith("mmlu_") else None


def _documents(
    rows: dict[str, list[Row]], subject: str | None, limit: int | None, place: str
) -> Callable[..., dict[str, Dataset]]:
    """What lm-eval calls in place of ``datasets.load_dataset``; splits that are not needed are empty."""

    def load(**_: Any) -> dict[str, Dataset]:
        own = {
            split: [row for row in found if subject is None or row["subject"] == subject]
            for split, found in rows.items()
        }
        if not any(own[split] for split in _EVALUATED):
            raise CalibrantError(f"{place}: its file has no rows{f' of the subject {subject}' if subject else ''}")
        return {
            split: Dataset.from_list(found[:limit] if split in _EVALUATED else found) for split, found in own.items()
        }

    return load


def _revision(manager: Any, member: str) -> dict[str, Any]:
    """The hub data set's revision of now, so that what is loaded is what is recorded."""
    path = str(load_yaml(manager.task_index[member].yaml_path, resolve_func=False)["dataset_path"])
    return {"dataset_kwargs": {"revision": _resolved(path)}}


@cache
def _resolved(path: str) -> str:
    import huggingface_hub

    try:
        return str(huggingface_hub.HfApi().dataset_info(path).sha)
    except Exception as error:  # the hub client raises many unrelated classes for "not reachable" and "not there"
        raise CalibrantError(f"{HUB}{path}: cannot be resolved on the hub ({first_line(error)})") from error


def build_requests(tasks: Sequence[ConfigurableTask], limit: int | None) -> list[Any]:
    """The requests of the first ``limit`` documents of each task, kept by the tasks too."""
    with quiet_lm_eval():
        for task in tasks:
            task.build_all_requests(limit=limit)
    return [instance for task in tasks for instance in task.instances]
