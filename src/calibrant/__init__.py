"""Calibration data and post-training compression for language models.

``import calibrant as cb`` gives the whole public API. Heavy libraries are imported when a function is first used.
"""

from typing import TYPE_CHECKING, Any

from calibrant.version import __version__

_MODULES = {
    "CalibrantError": "calibrant.errors",
    "CalibrationSet": "calibrant.calibration.calibration_set",
    "Corpus": "calibrant.calibration.corpus",
    "TemperatureSchedule": "calibrant.calibration.sources.self_calibration",
    "FilterRequest": "calibrant.calibration.selection.request",
    "MixRequest": "calibrant.calibration.selection.request",
    "Recipe": "calibrant.recipes.recipe",
    "compress": "calibrant.api",
    "evaluate": "calibrant.api",
    "generate": "calibrant.calibration.making",
    "rebuild": "calibrant.calibration.making",
    "score_corpora": "calibrant.calibration.selection.corpus_scores",
    "select": "calibrant.calibration.making",
    "write_importance_matrix": "calibrant.api",
}
__all__ = [
    "CalibrantError",
    "CalibrationSet",
    "Corpus",
    "FilterRequest",
    "MixRequest",
    "Recipe",
    "TemperatureSchedule",
    "__version__",
    "compress",
    "evaluate",
    "generate",
    "rebuild",
    "score_corpora",
    "select",
    "write_importance_matrix",
]

if TYPE_CHECKING:
    from calibrant.api import compress, evaluate, write_importance_matrix
    from calibrant.calibration.calibration_set import CalibrationSet
    from calibrant.calibration.corpus import Corpus
    from calibrant.calibration.making import generate, rebuild, select
    from calibrant.calibration.selection.corpus_scores import score_corpora
    from calibrant.calibration.selection.request import FilterRequest, MixRequest
    from calibrant.calibration.sources.self_calibration import TemperatureSchedule
    from calibrant.errors import CalibrantError
    from calibrant.recipes.recipe import Recipe


def __getattr__(name: str) -> Any:
    import importlib

    if name not in _MODULES:
        raise AttributeError(f"module 'calibrant' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
