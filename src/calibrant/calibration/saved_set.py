"""A calibration set that is saved where it is made, so that making it continues after an interruption."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from calibrant.calibration.calibration_set import CalibrationSet, set_library_versions
from calibrant.journal import Journal, check_same_run, is_unfinished
from calibrant.version import __version__


def saved_set(
    target: Path, overwrite: bool, identity: dict[str, Any], make: Callable[[Journal], CalibrationSet]
) -> CalibrationSet:
    """The set that ``make`` makes, saved in the folder ``target``, which ``check_output`` has checked.

    ``make`` keeps what a model has computed in the journal beside ``target``, which is of the set with ``identity``,
    and continues from there.

    Raises:
        CalibrantError: the set cannot be saved, another run writes there, or an unfinished set there is another one.
    """
    what = {"set": identity, "calibrant_version": __version__, "libraries": set_library_versions()}
    if is_unfinished(target) and not overwrite:
        check_same_run(target, what)
    journal = Journal(target, what, overwrite)
    with journal.held():
        made = make(journal)
        made.save(target, overwrite=overwrite)
        journal.remove()
    return made
