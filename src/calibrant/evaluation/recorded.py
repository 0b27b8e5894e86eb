"""An evaluation kept in the folder of the model that it is of."""

import json
from dataclasses import asdict
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from calibrant.errors import CalibrantError, first_line
from calibrant.evaluation.comparison import Evaluation
from calibrant.hashing import canonical_json, sha256_file
from calibrant.output_folder import whole_file

EVALUATION_NAME = "evaluation.json"


class _Recorded(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    record_sha256: str
    evaluation: Evaluation


def save_evaluation(folder: Path, record: Path, found: Evaluation) -> None:
    """Write ``found`` into ``folder``, with the hash of the ``record`` of the compression that it measured.

    Raises:
        CalibrantError: the folder cannot be written.
    """
    with whole_file(folder / EVALUATION_NAME) as beside:
        kept = {"record_sha256": sha256_file(record), "evaluation": asdict(found)}
        beside.write_text(canonical_json(kept), encoding="utf-8")


def saved_evaluation(folder: Path, record: Path) -> Evaluation | None:
    """The evaluation in ``folder``; None if there is none, or the one of another compression.

    Raises:
        CalibrantError: the file is damaged.
    """
    file = folder / EVALUATION_NAME
    if not file.is_file():
        return None
    try:
        found = _Recorded.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        said = "keys are missing or wrong" if isinstance(error, ValidationError) else first_line(error)
        raise CalibrantError(f"{file}: no evaluation that can be read ({said}); remove it or evaluate again") from error
    return found.evaluation if found.record_sha256 == sha256_file(record) else None
