"""A finished output as pages and comparisons read it."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from calibrant.engine.block_solver import LayerReport
from calibrant.errors import CalibrantError
from calibrant.evaluation.comparison import Evaluation
from calibrant.evaluation.recorded import saved_evaluation
from calibrant.formats.safetensors_file import element_bytes
from calibrant.modeling.weight_files import find_weights
from calibrant.pipeline.record import RECORD_NAME, RunRecord, RunReport
from calibrant.recipes.parts import Scheme

_PLACE = re.compile(r"(?P<stack>.*?)\.(?P<block>\d+)\.(?P<kind>.+)")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True)
class Output:
    """An output folder with its record, its report, and the evaluation that was saved in it, if any."""

    folder: Path
    record: RunRecord
    report: RunReport
    evaluation: Evaluation | None

    @classmethod
    def read(cls, folder: str | Path) -> "Output":
        """Read an output folder.

        Raises:
            CalibrantError: the folder is no output, or a file in it cannot be read.
        """
        path = Path(folder)
        if not (path / RECORD_NAME).is_file():
            raise CalibrantError(f"{folder}: no compressed model of Calibrant, which has a file {RECORD_NAME}")
        evaluation = saved_evaluation(path, path / RECORD_NAME)
        return cls(path, RunRecord.read(path), RunReport.read(path), evaluation)

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    @property
    def layers(self) -> list[LayerReport]:
        """The layers that were solved one by one."""
        return self.record.layers

    @cached_property
    def stored_bits(self) -> float | None:
        """Bits on disk for each compressed weight, scales and zeros included; None if layers are not stored alone."""
        bits, elements = 0, 0
        own: dict[str, int] = {}
        for name, info in find_weights(self.folder).tensors.items():
            layer, _, part = name.rpartition(".")
            if part == "bias":
                continue
            own[layer] = own.get(layer, 0) + math.prod(info.shape) * 8 * element_bytes(info.dtype)
        for one in self.layers:
            if one.name not in own:
                return None
            bits += own[one.name]
            elements += one.elements
        return bits / elements if elements else None

    def errors_by_kind(self) -> dict[str, float]:
        """Mean relative error of every kind of layer, in the model's order."""
        return {kind: mean_error(layers) for kind, layers in by_kind(self.layers).items()}


def place(name: str) -> tuple[str, str]:
    """Block and kind of a layer: ``model.layers.3.mlp.up_proj`` is ``mlp.up_proj`` of ``model.layers.3``.

    Further numbers, those of experts, are stars. A layer outside numbered blocks is a kind of its own, in block "".
    """
    found = _PLACE.fullmatch(name)
    if found is None:
        return "", name
    return f"{found['stack']}.{found['block']}", _NUMBER.sub("*", found["kind"])


def by_kind(layers: Sequence[LayerReport]) -> dict[str, list[LayerReport]]:
    """The layers of each kind."""
    found: dict[str, list[LayerReport]] = {}
    for layer in layers:
        found.setdefault(place(layer.name)[1], []).append(layer)
    return found


def mean_error(layers: Sequence[LayerReport]) -> float:
    """Unweighted mean of the relative errors."""
    return sum(layer.relative_error for layer in layers) / len(layers)


def scheme_text(scheme: Scheme) -> str:
    """A scheme in words: "4 bits, symmetric, groups of 64; zeros 2:4"."""
    said = []
    if scheme.weights is not None:
        weights, size = scheme.weights, scheme.weights.group_size
        groups = (
            f"one scale per {weights.granularity}"
            if size is None
            else "groups"
            if size == "auto"
            else f"groups of {size}"
        )
        kind = f"{weights.bits} bits, {'' if weights.symmetric else 'a'}symmetric"
        said.append(f"{weights.type if weights.floating else kind}, {groups}")
    if scheme.activations is not None:
        said.append(f"{scheme.activations.type} activations, {'dynamic' if scheme.activations.dynamic else 'static'}")
    if scheme.lm_head is not None:
        said.append(f"{scheme.lm_head.bits}-bit lm_head")
    if scheme.kv_cache is not None:
        said.append(f"{scheme.kv_cache.type} keys and values, one scale per {scheme.kv_cache.granularity}")
    if scheme.sparsity is not None:
        said.append(f"zeros {scheme.sparsity}")
    return "; ".join(said)
