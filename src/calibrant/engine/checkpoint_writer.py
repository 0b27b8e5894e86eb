"""Writing solved blocks to disk, and verifying the written files against the solved values."""

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from calibrant.engine.block_solver import BlockSolver
from calibrant.errors import CalibrantError
from calibrant.formats.input_rounding import INPUT_ROUNDING, read_input_rounding, write_input_rounding
from calibrant.formats.outliers import OUTLIERS, sparse_part
from calibrant.formats.quantized import Codes, Layout
from calibrant.formats.registry import format_for
from calibrant.formats.safetensors_file import replace_tensors
from calibrant.formats.shards import ShardWriter
from calibrant.hashing import sha256_bytes
from calibrant.modeling.expert_tensors import expert_tensors
from calibrant.modeling.lazy_model import LazyModel
from calibrant.recipes.plan import Plan


class CheckpointWriter:
    """Writes checkpoint tensors as they are finished to the folder ``parts`` and keeps their hashes for ``verify``."""

    def __init__(self, model: LazyModel, plan: Plan, parts: Path, metadata: dict[str, str]) -> None:
        self._shards = ShardWriter(parts, metadata)
        self._outliers = ShardWriter(parts / OUTLIERS, metadata)
        self._model, self._plan = model, plan
        self._hashes: dict[str, str] = {}
        self._dense: set[str] = set()
        self._codes: dict[str, tuple[str, Layout]] = {}
        # Grids of int8 inputs that no quantized layout stores.
        self._inputs: dict[str, tuple[float, int] | None] = {}

    def write(self, tensors: dict[str, torch.Tensor]) -> None:
        """Write tensors under their checkpoint names."""
        # Floats of one byte are codes.
        floats = {name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.itemsize > 1}
        self._dense |= {name for name in floats if tensors[name].ndim == 2}
        self._write(tensors, self._shards)

    def dense_matrices(self) -> set[str]:
        """Checkpoint names, without their last part, of the matrices ``x.weight`` that were written dense."""
        return {name.removesuffix(".weight") for name in self._dense if name.endswith(".weight")}

    def _write(self, tensors: dict[str, torch.Tensor], shards: ShardWriter) -> None:
        self._hashes.update({name: _tensor_hash(tensor) for name, tensor in tensors.items()})
        shards.write_part(tensors)

    def finish(self, folder: Path) -> list[Path]:
        """Make files of the parts in ``folder``; returns them, with the model's before those of outliers."""
        return [*self._shards.finish(folder), *self._outliers.finish(folder / OUTLIERS)]

    def state(self) -> dict[str, Any]:
        """What ``resume`` needs, once all that was written is on the disk."""
        return {
            "parts": [self._shards.sync(), self._outliers.sync()],
            "hashes": self._hashes,
            "dense": sorted(self._dense),
            "codes": {base: [codes, asdict(layout)] for base, (codes, layout) in self._codes.items()},
            "inputs": {name: grid and list(grid) for name, grid in self._inputs.items()},
        }

    def start_empty(self) -> None:
        """Remove what an interrupted run has written without a state that knows it."""
        self.resume({"parts": [0, 0], "hashes": {}, "dense": [], "codes": {}, "inputs": {}})

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from a ``state``; parts that were written later are removed.

        Raises:
            OSError, ValueError: a part is missing or damaged, or a tensor in it has changed.
        """
        for shards, count in zip((self._shards, self._outliers), state["parts"], strict=True):
            shards.resume(count)
        self._hashes, self._dense = dict(state["hashes"]), set(state["dense"])
        for name, part in {**self._shards.places, **self._outliers.places}.items():
            if self._hashes.get(name) != _tensor_hash(_read(part, name)):
                raise ValueError(f"{part.name}: tensor {name} has changed")
        self._codes = {base: (codes, Layout(**layout)) for base, (codes, layout) in state["codes"].items()}
        self._inputs = {name: grid and (grid[0], grid[1]) for name, grid in state["inputs"].items()}

    def write_block(self, solver: BlockSolver) -> None:
        """Write a solved block: codes in the plan's quantized layout, if it has one, and all other tensors dense."""
        prefix = solver.block.name
        packed: dict[str, torch.Tensor] = {}
        dense = {f"{prefix}.{name}": value for name, value in solver.block.state.items()}
        dense = {name: value for name, value in dense.items() if not self._model.is_shared(name, prefix)}
        solved = {f"{prefix}.{linear}" for linear in solver.solved_parameters}
        untouched = [name for name in dense if name not in solved and self._model.is_stored_alone(name)]
        for name in untouched:
            del dense[name]
            stored_name = self._model.stored_name(name)
            kept = self._model.folder.read(stored_name)  # keeps the stored dtype and bits
            if kept.is_floating_point() and not bool(kept.isfinite().all()):
                file = self._model.folder.tensors[stored_name].file
                raise CalibrantError(
                    f"{file}: tensor {stored_name} has values that are not finite; copy or download it again"
                )
            packed[stored_name] = kept
        for name, codes in solver.codes.items():
            full = f"{prefix}.{name}"
            layout = self._plan.target_of(full).layout
            if layout is not None and f"{full}.weight" in dense:
                packed.update(self._packed(self._base(full), codes, layout))
                del dense[f"{full}.weight"]
            elif layout is None and self._plan.recipe.scheme.activations is not None:
                self._inputs[full] = _input_grid(codes)
        for name, scale in solver.cache_scales.items():
            attention, _, part = f"{prefix}.{name}".rpartition(".")
            packed[f"{self._stored_module(attention)}.{part}"] = scale.to(self._model.folder.dtype)
        for parameter in [name for name in dense if self._is_packed_experts(name)]:
            packed.update(self._packed_experts(parameter, solver))
            del dense[parameter]
        stored = self._model.to_checkpoint({name: value.contiguous() for name, value in dense.items()})
        self.write({**stored, **packed})
        for name, (weight, exact) in solver.outliers.items():
            self._write(sparse_part(f"{prefix}.{name}", weight, exact), self._outliers)

    def write_head(self, name: str, codes: Codes, layout: Layout) -> None:
        """Write the codes of the linear ``name``, the output matrix."""
        self.write(self._packed(self._base(name), codes, layout))

    def codes(self, linears: Iterable[str], files: list[Path]) -> dict[str, Codes]:
        """The codes in ``files``, which ``finish`` wrote, of those ``linears`` (full names) that have codes there."""
        places, found = _places(files), {}
        for name in linears:
            base = self._base(name)
            if base in self._codes:
                found[name] = _read_codes(base, self._codes[base][1], places)
        return found

    def replace(self, codes: dict[str, Codes], weights: dict[str, torch.Tensor], files: list[Path]) -> None:
        """Put other codes and dense weights of linears, by full name, into ``files``, which ``finish`` wrote."""
        changed = self._model.to_checkpoint({f"{name}.weight": weight for name, weight in weights.items()})
        for name, own in codes.items():
            changed.update(self._packed(self._base(name), own, self._codes[self._base(name)][1]))
        self._hashes.update({name: _tensor_hash(tensor) for name, tensor in changed.items()})
        places = _places(files)
        for file in files:
            own_tensors = {name: tensor for name, tensor in changed.items() if places[name] == file}
            if own_tensors:
                replace_tensors(own_tensors, file)

    def _base(self, linear: str) -> str:
        """How the stored names of a linear's tensors begin."""
        return self._model.stored_name(f"{linear}.weight").removesuffix("weight")

    def _stored_module(self, name: str) -> str:
        """The name of a module in the checkpoint, by one of its parameters."""
        inner = next(inner for inner, _ in self._model.module.get_submodule(name).named_parameters())
        return self._model.stored_name(f"{name}.{inner}").removesuffix(f".{inner}")

    def _packed(self, base: str, codes: Codes, layout: Layout) -> dict[str, torch.Tensor]:
        """The tensors of a linear, whose names begin with ``base``."""
        self._codes[base] = _codes_hash(codes), layout
        return {base + suffix: tensor for suffix, tensor in format_for(layout).write(codes, layout).items()}

    def _is_packed_experts(self, parameter: str) -> bool:
        return parameter in self._plan.fused and self._plan.fused_layout is not None

    def _packed_experts(self, parameter: str, solver: BlockSolver) -> dict[str, torch.Tensor]:
        """The tensors of all linears that the fused ``parameter`` is made of."""
        layout, name = self._plan.fused_layout, parameter.removeprefix(f"{solver.block.name}.")
        assert layout is not None
        packed: dict[str, torch.Tensor] = {}
        if layout.format == "gpt-oss":
            experts = self._plan.fused[parameter][0]
            below = Codes.stacked([solver.codes[f"{name}.{expert}"] for expert in range(experts)])
            tensors = self._packed(self._model.stored_name(parameter), below, layout)
            return {one: tensor.unflatten(0, (experts, -1)) for one, tensor in tensors.items()}
        for part in expert_tensors(self._model.module, parameter, self._plan.fused[parameter]):
            codes = solver.codes[f"{name}.{part.expert}"].rows(part.rows)
            packed.update(self._packed(f"{part.name}.", codes, layout))
        return packed

    def write_input_rounding(self, folder: Path) -> None:
        """Write the grids of rounded inputs that no quantized layout stores, if there are any."""
        if self._inputs:
            write_input_rounding(folder, self._inputs)

    def verify(self, files: list[Path]) -> int:
        """Read the written files and compare them with the solved values; returns the number of tensors.

        Raises:
            CalibrantError: a file differs from the solved values.
        """
        places = _places(files)
        for name, file in places.items():
            # Reopened for each tensor: pages read from a mapped file count as memory until it is closed.
            if self._hashes.get(name) != _tensor_hash(_read(file, name)):
                raise CalibrantError(f"{file}: tensor {name} is not what was solved; the disk may be failing")
        if set(places) != set(self._hashes):
            raise CalibrantError(f"{files[0].parent}: tensors are missing after writing; the disk may be failing")
        for base, (expected, layout) in self._codes.items():
            self._verify_codes(base, expected, layout, places)
        if read_input_rounding(files[0].parent) != self._inputs:
            raise CalibrantError(f"{files[0].parent / INPUT_ROUNDING}: is not what was solved; the disk may be failing")
        return len(places)

    def _verify_codes(self, base: str, expected: str, layout: Layout, places: dict[str, Path]) -> None:
        if _codes_hash(_read_codes(base, layout, places)) != expected:
            file = next(place for name, place in places.items() if name.startswith(base))
            raise CalibrantError(f"{file}: {base}* does not unpack to what was solved")


def _places(files: list[Path]) -> dict[str, Path]:
    """The file of every tensor."""
    places: dict[str, Path] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            places.update(dict.fromkeys(opened.keys(), file))
    return places


def _read_codes(base: str, layout: Layout, places: dict[str, Path]) -> Codes:
    """The codes of the linear whose tensors' names begin with ``base``."""
    own = [name for name in places if name.startswith(base) and "." not in name.removeprefix(base)]
    return format_for(layout).read({name.removeprefix(base): _read(places[name], name) for name in own}, layout)


def _read(file: Path, name: str) -> torch.Tensor:
    with safe_open(file, framework="pt") as opened:
        tensor: torch.Tensor = opened.get_tensor(name)
    return tensor


def _tensor_hash(tensor: torch.Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return sha256_bytes(str((tensor.dtype, tuple(tensor.shape))).encode(), flat.tobytes())


def _input_grid(codes: Codes) -> tuple[float, int] | None:
    if codes.input_scale is None or codes.input_zero_point is None:
        return None
    return float(codes.input_scale), int(codes.input_zero_point)


def _codes_hash(codes: Codes) -> str:
    return "".join(f"{name} {_tensor_hash(tensor)}" for name, tensor in vars(codes).items() if tensor is not None)
