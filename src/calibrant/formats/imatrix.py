"""llama.cpp's importance matrix as a GGUF file (ggml-org/llama.cpp, ``tools/imatrix/imatrix.cpp``)."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from calibrant.errors import CalibrantError
from calibrant.formats.gguf_names import gguf_library


@dataclass(frozen=True)
class ImportanceMatrix:
    """What a written importance matrix contains.

    Attributes:
        architecture: the architecture that llama.cpp's converter takes for the model.
        tensors: names of the GGUF tensors in it.
        left_out: layers of the model's blocks without a name in llama.cpp, and GGUF tensors that it multiplies with
            something else than the input of a layer.
    """

    architecture: str
    tensors: tuple[str, ...]
    left_out: tuple[str, ...]


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
    writer = gguf_library().GGUFWriter(path, arch="")  # llama.cpp writes no architecture into such files
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
    found = {tensor.name: np.asarray(tensor.data) for tensor in gguf_library().GGUFReader(path).tensors}
    same = len(found) == 2 * len(sums) and all(
        np.array_equal(found[f"{name}.in_sum2"], total.astype(np.float32))
        and np.array_equal(found[f"{name}.counts"], tokens.astype(np.float32))
        for name, (total, tokens) in sums.items()
    )
    if not same:
        raise CalibrantError(f"{path}: differs from what was measured; the disk may be failing")
