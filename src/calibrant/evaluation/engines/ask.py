"""Asking an engine: its worker runs in a Python that has the engine, and answers with log-probabilities."""

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from calibrant.errors import CalibrantError, first_line

EngineName = Literal["transformers", "vllm", "llama.cpp"]
ENGINES: tuple[EngineName, ...] = get_args(EngineName)
_MODULES = {"transformers": "transformers", "vllm": "vllm", "llama.cpp": "xllamacpp"}
_WORKERS = {"transformers": "transformers_worker.py", "vllm": "vllm_worker.py", "llama.cpp": "llama_cpp_worker.py"}
# Seconds of an import; the first one of a new environment compiles everything.
_IMPORT_SECONDS = 300
_MOST_CHARACTERS = 300
_ERROR = re.compile(r"\b\w*(?:Error|Exception): .+")
# vLLM's processes repeat an error of one of them without its words.
_POINTER = re.compile(r"root cause|stack trace")


@dataclass(frozen=True)
class Request:
    """What a worker is asked.

    ``model`` is a folder, or a GGUF file for llama.cpp. At every position of the ``windows`` (token ids) the
    log-probabilities of the ``top`` likeliest next tokens are wanted, and what follows ``prompt``, greedily.
    ``dequantize`` has transformers unpack weights while it loads them. ``plain_token`` is of whole characters.
    """

    model: str
    architecture: str
    windows: list[list[int]]
    prompt: list[int]
    new_tokens: int
    top: int
    dtype: str = "float32"
    device: str = "cpu"
    dequantize: bool = False
    plain_token: int = 0
    threads: int = 1


@dataclass(frozen=True)
class Answer:
    """What an engine says: of each position of each window log-probabilities by token; the tokens it wrote; costs."""

    version: str
    positions: list[list[dict[int, float]]]
    written: list[int]
    load_seconds: float
    tokens_per_second: float
    peak_bytes: int


def ask(engine: EngineName, python: Path | None, request: Request) -> Answer:
    """Run the worker of ``engine`` in ``python`` (None: this one) and wait for its answer.

    Raises:
        CalibrantError: that Python has no such engine, or the engine fails; the message has its last words.
    """
    # Absolute, since the worker runs in another folder; links stay, they tell which environment a Python is of.
    interpreter = str((python or Path(sys.executable)).absolute())
    _check(engine, interpreter)
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "request.json", Path(folder) / "answer.json"
        asked.write_text(json.dumps(asdict(request)), encoding="utf-8")
        worker = Path(__file__).parent / _WORKERS[engine]
        # In a folder of its own, and isolated, so that no file beside the worker is taken for a module.
        command = [interpreter, str(worker), str(asked), str(answered)]
        ran = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=_environment(), check=False)
        if ran.returncode != 0 or not answered.is_file():
            raise CalibrantError(f"{request.model}: {engine} fails on it ({_last_words(ran.stdout + ran.stderr)})")
        found = json.loads(answered.read_text(encoding="utf-8"))
    found["positions"] = [
        [{int(token): value for token, value in place.items()} for place in window] for window in found["positions"]
    ]
    return Answer(**found)


def _check(engine: EngineName, interpreter: str) -> None:
    module = _MODULES[engine]
    # Found, not imported: an import of vLLM takes half a minute.
    look = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    try:
        ran = subprocess.run([interpreter, "-c", look], capture_output=True, timeout=_IMPORT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CalibrantError(f"{interpreter}: is no Python that runs ({first_line(error)})") from error
    if ran.returncode != 0:
        raise CalibrantError(
            f"{interpreter}: has no package {module}, which runs {engine}; install it there, or give the Python of an "
            "environment that has it (`python`)"
        )


def _environment() -> dict[str, str]:
    """Offline, and without this interpreter's search path."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    # vLLM for processors would take most of the memory for its cache; windows this short need little.
    small = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    return {**kept, **small, "HF_HUB_OFFLINE": "1"}


def _last_words(text: str) -> str:
    """The last error in ``text`` that says what is wrong and does not point elsewhere, else the last line."""
    errors = [found for found in _ERROR.findall(text) if not _POINTER.search(found)]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (errors or lines or ["no words"])[-1][:_MOST_CHARACTERS]
