"""llama.cpp's importance matrix as a GGUF file (formats.md §7)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from calibrant.errors import CalibrantError

_BOTH = ".gate_up_proj"


def write_imatrix(
    path: Path, sums: Mapping[str, tuple[np.ndarray, np.ndarray]], datasets: list[str], chunks: int, chunk_size: int
) -> None:
    """Write sums of squared inputs ``[matrices, in]`` and numbers of tokens ``[matrices, 1]`` by GGUF tensor name.

    A tensor of merged experts has a matrix for each, others one. Equal input gives equal bytes.
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
    """Read the file again.

    Raises:
        CalibrantError: it does not hold ``sums``.
    """
    found = {tensor.name: np.asarray(tensor.data) for tensor in _gguf().GGUFReader(path).tensors}
    same = len(found) == 2 * len(sums) and all(
        np.array_equal(found[f"{name}.in_sum2"], total.astype(np.float32))
        and np.array_equal(found[f"{name}.counts"], tokens.astype(np.float32))
        for name, (total, tokens) in sums.items()
    )
    if not same:
        raise CalibrantError(f"{path}: is not what was measured; the disk may be failing")


def gguf_names(model_type: str, blocks: int, modules: list[str]) -> dict[str, list[str]]:
    """What llama.cpp calls the weights of ``modules``, or of fused experts, of a model with so many blocks.

    Kinds that llama.cpp has no name of its own for are converted as Llama, as it does with Mistral and Mixtral. Of
    most kinds it keeps gates and ups of experts apart that are one parameter in transformers: these have two names.

    Raises:
        CalibrantError: a module has no name there.
    """
    gguf = _gguf()
    known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    plain = model_type.removesuffix("_text")
    arch = known.get(plain) or known.get(plain.replace("_", "")) or gguf.MODEL_ARCH.LLAMA
    names = gguf.get_tensor_name_map(arch, blocks)

    def of(*spellings: str) -> list[str | None]:
        return [names.get_name(f"{one}.weight", try_suffixes=(".weight",)) for one in spellings]

    found: dict[str, list[str]] = {}
    for module in modules:
        called = of(module)
        if None in called and module.endswith(_BOTH):
            base = module.removesuffix(_BOTH)
            called = of(f"{base}.gate_proj", f"{base}.up_proj")
        if None in called:
            raise CalibrantError(f"{module}: llama.cpp has no name for this layer of {model_type} models")
        found[module] = [str(name) for name in called]
    return found


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise CalibrantError("importance matrices need the extra: pip install 'calibrant[gguf]'") from error
    return gguf
