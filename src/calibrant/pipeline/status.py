"""Where the run is that writes a model or a calibration set to an output folder."""

from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from calibrant.calibration.calibration_set import MANIFEST_NAME, CalibrationSet
from calibrant.calibration.selection.model_scores import SCORES
from calibrant.calibration.sources.kept_rows import ROWS
from calibrant.engine import block_checkpoints, sensitivity, two_stage_pruning
from calibrant.errors import CalibrantError
from calibrant.journal import SET, is_running, journal_folder, read_identity, saved_numbers, saved_states
from calibrant.pipeline.record import RECORD_NAME, RunRecord
from calibrant.training import training_loop

State = Literal["finished", "running", "interrupted", "nothing"]


# What states say that count what is done.
_COUNTED = {
    block_checkpoints.NAME: "block {done} of {blocks}",
    training_loop.NAME: "step {done} of the training",
    sensitivity.NAME: "the sensitivity of block {done} of {blocks}",
    two_stage_pruning.NEURONS: "the neurons of block {done} of {blocks}",
}
_OTHERS = {
    "budget": "the budget",
    "scales": "a part of the learned scales",
    two_stage_pruning.ATTENTION: "a part of the search for attention modules",
}


@dataclass(frozen=True)
class RunStatus:
    """Where a run is.

    Attributes:
        output: the output folder.
        state: "finished" (the output is there), "running", "interrupted" (the same command continues), or "nothing".
        recipe: the recipe of a compression; None if there is none.
        strategy: the strategy of a calibration set that is or was made there alone; None if there is none.
        done: what is saved, as in "block 12 of 30"; empty if nothing is.
        saved: when that was saved (local time, ISO 8601); None if nothing is.
    """

    output: Path
    state: State
    recipe: str | None = None
    strategy: str | None = None
    done: str = ""
    saved: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {**asdict(self), "output": str(self.output)}

    def sentence(self) -> str:
        """The status in one sentence."""
        if self.state == "nothing":
            return f"{self.output}: no run and no output"
        what = self.recipe if self.strategy is None else f"calibration set of {self.strategy}"
        if self.state == "finished":
            return f"{self.output}: finished, {what}"
        saved = f"saved: {self.done} ({self.saved})" if self.done else "nothing is saved yet"
        way = "" if self.state == "running" else "; the same command continues from there" * bool(self.done)
        return f"{self.output}: {self.state}, {what}; {saved}{way}"


def run_status(output: Path) -> RunStatus:
    """The status of the run that writes to ``output``: an unfinished one first, else the finished output.

    Raises:
        CalibrantError: the journal or the output is damaged, or something else is in the journal's place.
    """
    folder = journal_folder(output)
    running = is_running(folder)
    states = saved_states(folder) if folder.is_dir() else []
    of_model, of_set = output / RECORD_NAME, output / MANIFEST_NAME
    record = of_model if of_model.is_file() else of_set
    # A run that is killed while it removes its journal has published its output.
    published = not running and bool(states) and record.is_file() and record.stat().st_mtime > states[-1].written
    if folder.is_dir() and not published and (running or states or (folder / SET).is_dir()):
        recipe, strategy = _made(folder)
        saved = None
        if states:
            saved = datetime.fromtimestamp(states[-1].written).astimezone().isoformat(timespec="seconds")
        return RunStatus(output, "running" if running else "interrupted", recipe, strategy, _done(folder), saved)
    if of_model.is_file():
        return RunStatus(output, "finished", RunRecord.read(output).recipe.name)
    if of_set.is_file():
        return RunStatus(output, "finished", strategy=CalibrationSet.load(output).manifest.strategy)
    return RunStatus(output, "nothing")


def _made(folder: Path) -> tuple[str | None, str | None]:
    """The recipe of a compression, or the strategy of a calibration set, whose journal is in ``folder``."""
    found = read_identity(folder)
    try:
        return (None, str(found["set"]["strategy"])) if "set" in found else (str(found["recipe"]["name"]), None)
    except (KeyError, TypeError) as error:
        raise CalibrantError(f"{folder}: does not say what it makes; delete the folder to begin anew") from error


def _done(folder: Path) -> str:
    names = [state.name for state in saved_states(folder)]
    scored = [name for name in names if name.startswith(f"{SCORES}-")]
    if scored:
        return f"the scores of {sum(int(_said(folder, name, '{done}')) for name in scored)} candidates"
    counted = [name for name in names if name in _COUNTED]
    if counted:
        return _said(folder, counted[-1], _COUNTED[counted[-1]])
    if any(name.startswith(f"{ROWS}-") for name in names) and not (folder / SET).is_dir():
        return "a part of the calibration set"
    found = [text for name, text in _OTHERS.items() if name in names]
    return found[-1] if found else "the calibration set" if (folder / SET).is_dir() else ""


def _said(folder: Path, name: str, text: str) -> str:
    """``text`` with the numbers of the state ``name``."""
    numbers = {key: value for key, value in saved_numbers(folder, name).items() if isinstance(value, int)}
    try:
        return text.format(**numbers)
    except KeyError as error:
        raise CalibrantError(
            f"{folder}: its state {name} does not say {error}; delete the folder to begin the run anew"
        ) from error
