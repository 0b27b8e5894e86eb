"""Files of a model folder besides weights: tokenizer, templates, code, generation settings, licence."""

import shutil
from pathlib import Path

# Ours: the largest tokenizers of known models have less than half.
LARGEST_SIDE_FILE = 64 * 2**20
# Names that outputs have for something of their own.
_WRITTEN = {
    "calibrant.json", "report.json", "report.html", "evaluation.json", "config.json", "readme.md", "calibration",
    "outliers", "training",
}  # fmt: skip
_WEIGHTS = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".ggml", ".onnx", ".onnx_data", ".npz",
    ".npy", ".ot", ".tflite", ".mlmodel", ".nemo", ".engine", ".distcp", ".index.json",
}  # fmt: skip
# What describes weights that the output does not hold, or the training that made the source.
_LEFTOVERS = {
    "adapter_config.json", "hf_quant_config.json", "quantize_config.json", "quant_config.json", "recipe.yaml",
    "input_rounding.json", "trainer_state.json", "training_args.json",
}  # fmt: skip


def copy_side_files(source: Path, target: Path) -> list[str]:
    """Copy the files of a model folder but weights, descriptions of weights and hidden files.

    A subfolder is copied unless it holds weights or more than ``LARGEST_SIDE_FILE``. Returns the names of the files
    and subfolders that were left out for their size, or for an ending that weights have.
    """
    left_out = []
    for path in sorted(source.iterdir()):
        if _is_hidden(path) or path.name.lower() in _WRITTEN | _LEFTOVERS:
            continue
        files = [path] if path.is_file() else sorted(_files(path))
        fits = sum(file.stat().st_size for file in files) <= LARGEST_SIDE_FILE
        if not fits or any(file.name.lower().endswith(tuple(_WEIGHTS)) for file in files):
            left_out.append(path.name)
            continue
        for file in files:
            copy = target / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
    return left_out


def _is_hidden(path: Path) -> bool:
    return path.name.startswith(".") or path.name == "__pycache__"


def _files(folder: Path) -> list[Path]:
    """Files below ``folder``, hidden ones and links to folders aside."""
    found: list[Path] = []
    for path in [] if folder.is_symlink() or not folder.is_dir() else folder.iterdir():
        if not _is_hidden(path):
            found += [path] if path.is_file() else _files(path)
    return found
