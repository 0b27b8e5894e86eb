"""llama.cpp's importance matrix as a GGUF file (formats.md §7)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from calibrant.errors import CalibrantError


def write_imatrix(
    path: Path, sums: Mapping[str, tuple[np.ndarray, int]], datasets: list[str], chunks: int, chunk_size: int
) -> None:
    """Write sums of squared inputs ``[in]`` and numbers of tokens by GGUF tensor name; equal input, equal bytes."""
    writer = _gguf().GGUFWriter(path, arch="")
    writer.kv_data[0].clear()  # llama.cpp writes no architecture into such files
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", datasets)
    writer.add_uint32("imatrix.chunk_count", chunks)
    writer.add_uint32("imatrix.chunk_size", chunk_size)
    for name in sorted(sums):
        total, tokens = sums[name]
        writer.add_tensor(f"{name}.in_sum2", total[None].astype(np.float32))
        writer.add_tensor(f"{name}.counts", np.array([[tokens]], dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _verify(path, sums)


def _verify(path: Path, sums: Mapping[str, tuple[np.ndarray, int]]) -> None:
    """Read the file again.

    Raises:
        CalibrantError: it does not hold ``sums``.
    """
    found = {tensor.name: np.asarray(tensor.data).ravel() for tensor in _gguf().GGUFReader(path).tensors}
    same = len(found) == 2 * len(sums) and all(
        np.array_equal(found[f"{name}.in_sum2"], total.astype(np.float32)) and found[f"{name}.counts"][0] == tokens
        for name, (total, tokens) in sums.items()
    )
    if not same:
        raise CalibrantError(f"{path}: is not what was measured; the disk may be failing")


def gguf_names(model_type: str, blocks: int, modules: list[str]) -> dict[str, str]:
    """What llama.cpp calls the weights of ``modules`` of a model with so many blocks.

    Kinds that llama.cpp has no name of its own for are converted as Llama, as it does with Mistral and Mixtral.

    Raises:
        CalibrantError: a module has no name there.
    """
    gguf = _gguf()
    known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    plain = model_type.removesuffix("_text")
    arch = known.get(plain) or known.get(plain.replace("_", "")) or gguf.MODEL_ARCH.LLAMA
    names = gguf.get_tensor_name_map(arch, blocks)
    found = {module: names.get_name(f"{module}.weight", try_suffixes=(".weight",)) for module in modules}
    missing = [module for module, name in found.items() if name is None]
    if missing:
        raise CalibrantError(f"{missing[0]}: llama.cpp has no name for this layer of a {model_type} model")
    return {module: str(name) for module, name in found.items()}


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise CalibrantError("importance matrices need the extra: pip install 'calibrant[gguf]'") from error
    return gguf
