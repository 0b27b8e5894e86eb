"""Where the run is that writes to an output folder."""

from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

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
        state: "finished" (the output is there), "running", "interrupted" (the same command goes on), or "nothing".
        recipe: the run's recipe; None if there is no run.
        done: what is saved, as in "block 12 of 30"; empty if nothing is.
        saved: when that was saved (local time, ISO 8601); None if nothing is.
    """

    output: Path
    state: State
    recipe: str | None = None
    done: str = ""
    saved: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {**asdict(self), "output": str(self.output)}

    def sentence(self) -> str:
        """The status in one sentence."""
        if self.state == "nothing":
            return f"{self.output}: no run and no output"
        if self.state == "finished":
            return f"{self.output}: finished, by {self.recipe}"
        saved = f"{self.done} is saved ({self.saved})" if self.done else "nothing is saved yet"
        way = "" if self.state == "running" else "; the same command goes on from there" * bool(self.done)
        return f"{self.output}: {self.state}, {self.recipe}; {saved}{way}"


def run_status(output: Path) -> RunStatus:
    """The status of the run that writes to ``output``: an unfinished one first, else the finished output.

    Raises:
        CalibrantError: the journal is damaged, or something else is in its place.
    """
    folder = journal_folder(output)
    running = is_running(folder)
    states = saved_states(folder) if folder.is_dir() else []
    record = output / RECORD_NAME
    # A run that is killed while it removes its journal has published its output.
    published = not running and bool(states) and record.is_file() and record.stat().st_mtime > states[-1].written
    if folder.is_dir() and not published and (running or states or (folder / SET).is_dir()):
        recipe = _recipe(folder)
        saved = None
        if states:
            saved = datetime.fromtimestamp(states[-1].written).astimezone().isoformat(timespec="seconds")
        return RunStatus(output, "running" if running else "interrupted", recipe, _done(folder), saved)
    if (output / RECORD_NAME).is_file():
        return RunStatus(output, "finished", RunRecord.read(output).recipe.name)
    return RunStatus(output, "nothing")


def _recipe(folder: Path) -> str:
    try:
        return str(read_identity(folder)["recipe"]["name"])
    except (KeyError, TypeError) as error:
        raise CalibrantError(f"{folder}: does not name its recipe; delete the folder to begin the run anew") from error


def _done(folder: Path) -> str:
    names = {state.name for state in saved_states(folder)}
    for name, said in _COUNTED.items():
        if name in names:
            try:
                return said.format(**saved_numbers(folder, name))
            except KeyError as error:
                raise CalibrantError(
                    f"{folder}: its state {name} does not say {error}; delete the folder to begin the run anew"
                ) from error
    if any(name.startswith("rows-") for name in names) and not (folder / SET).is_dir():
        return "a part of the calibration set"
    found = [text for name, text in _OTHERS.items() if name in names]
    return found[-1] if found else "the calibration set" if (folder / SET).is_dir() else ""
