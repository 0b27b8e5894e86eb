"""llama.cpp's importance matrix as a GGUF file (ggml-org/llama.cpp, ``tools/imatrix/imatrix.cpp``)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from calibrant.errors import CalibrantError

_GATE_AND_UP = ".gate_up_proj"


def write_imatrix(
    path: Path, sums: Mapping[str, tuple[np.ndarray, np.ndarray]], datasets: list[str], chunks: int, chunk_size: int
) -> None:
    """Write the sums of squared inputs ``[matrices, in]`` and token counts ``[matrices, 1]`` of each GGUF tensor name.

    Tensors of fused experts have one matrix per expert, other tensors one matrix. Equal input gives equal bytes.

    Args:
        path: the file to write.
        sums: both arrays by GGUF tensor name.
        datasets: names of the calibration texts.
        chunks: number of sequences.
        chunk_size: tokens per sequence.

    Raises:
        CalibrantError: the extra ``gguf`` is not installed, or the written file differs from ``sums``.
    """
    writer = _gguf().GGUFWriter(path, arch="")  # llama.cpp writes no architecture into such files
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", datasets)
    writer.add_uint32("imatrix.chunk_count", chunks)
    writer.add_uint32("imatrix.chunk_size", chunk_size)
    for name in sorted(sums):
        total, tokens = sums[name]
        writer.add_tensor(f"{name}.in_sum2", total.astype(np.float32))
        writer.add_tensor(f"{name}.counts", tokens.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _verify(path, sums)


def _verify(path: Path, sums: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Read the file again and compare it with ``sums``."""
    found = {tensor.name: np.asarray(tensor.data) for tensor in _gguf().GGUFReader(path).tensors}
    same = len(found) == 2 * len(sums) and all(
        np.array_equal(found[f"{name}.in_sum2"], total.astype(np.float32))
        and np.array_equal(found[f"{name}.counts"], tokens.astype(np.float32))
        for name, (total, tokens) in sums.items()
    )
    if not same:
        raise CalibrantError(f"{path}: differs from what was measured; the disk may be failing")


def gguf_names(model_type: str, blocks: int, modules: list[str]) -> dict[str, list[str]]:
    """llama.cpp's names for the weights of ``modules`` (linears or fused experts) in a model with ``blocks`` blocks.

    Model types unknown to llama.cpp get Llama's names, as llama.cpp does for Mistral and Mixtral. For most types
    llama.cpp stores gates and ups of experts as two tensors where transformers has one parameter, which then gets two
    names.

    Raises:
        CalibrantError: llama.cpp has no name for a module, or the extra ``gguf`` is not installed.
    """
    gguf = _gguf()
    known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    plain = model_type.removesuffix("_text")
    arch = known.get(plain) or known.get(plain.replace("_", "")) or gguf.MODEL_ARCH.LLAMA
    names = gguf.get_tensor_name_map(arch, blocks)

    def gguf_tensors(*modules: str) -> list[str | None]:
        return [names.get_name(f"{module}.weight", try_suffixes=(".weight",)) for module in modules]

    found: dict[str, list[str]] = {}
    for module in modules:
        tensors = gguf_tensors(module)
        if None in tensors and module.endswith(_GATE_AND_UP):
            base = module.removesuffix(_GATE_AND_UP)
            tensors = gguf_tensors(f"{base}.gate_proj", f"{base}.up_proj")
        if None in tensors:
            raise CalibrantError(f"{module}: llama.cpp has no name for this layer of {model_type} models")
        found[module] = [str(name) for name in tensors]
    return found


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise CalibrantError("importance matrices need the extra: pip install 'calibrant[gguf]'") from error
    return gguf
