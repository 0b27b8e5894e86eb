"""Files of a model folder besides weights: tokenizer, templates, code, generation settings, licence."""

import shutil
from pathlib import Path

# Ours: the largest tokenizers of known models have less than half.
LARGEST_SIDE_FILE = 64 * 2**20
_CHAT_TEMPLATES = "additional_chat_templates"
_WRITTEN = {"calibrant.json", "report.json", "config.json", "readme.md"}
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

    Returns the names of the files that were left out only because they are larger than ``LARGEST_SIDE_FILE``.
    """
    too_large = []
    for path in sorted(source.iterdir()):
        name = path.name.lower()
        if path.is_dir() and path.name == _CHAT_TEMPLATES:
            shutil.copytree(path, target / path.name)
        if (
            not path.is_file()
            or name.startswith(".")
            or name in _WRITTEN | _LEFTOVERS
            or name.endswith(tuple(_WEIGHTS))
        ):
            continue
        if path.stat().st_size > LARGEST_SIDE_FILE:
            too_large.append(path.name)
        else:
            shutil.copyfile(path, target / path.name)
    return too_large
