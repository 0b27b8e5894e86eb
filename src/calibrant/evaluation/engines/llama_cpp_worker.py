"""Asks llama.cpp by the package xllamacpp. Arguments: a file with the request, a file for the answer (``ask.py``)."""

import importlib.metadata
import json
import resource
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xllamacpp


def main(request: Path, answer: Path) -> None:
    asked = json.loads(request.read_text(encoding="utf-8"))
    begin = time.monotonic()
    server = xllamacpp.Server(_settings(asked))
    loaded = time.monotonic() - begin

    def post(**body: Any) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        address = server.listening_address + "/completion"
        call = urllib.request.Request(address, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(call) as response:
            said: dict[str, Any] = json.loads(response.read())
        return said

    positions = [_likeliest(post, window, asked) for window in asked["windows"]]
    begin = time.monotonic()
    # The text may end early: to go on beyond its end, llama.cpp would forbid the token that ends it.
    written = post(prompt=asked["prompt"], temperature=0, n_predict=asked["new_tokens"], return_tokens=True)
    seconds = time.monotonic() - begin
    found = {
        "version": importlib.metadata.version("xllamacpp"),
        "positions": positions,
        "written": written["tokens"],
        "load_seconds": loaded,
        "tokens_per_second": len(written["tokens"]) / seconds,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    answer.write_text(json.dumps(found), encoding="utf-8")


def _settings(asked: dict[str, Any]) -> Any:
    """Everything beside the products of matrices in float32."""
    settings = xllamacpp.CommonParams()
    longest = max(len(asked["prompt"]) + asked["new_tokens"], *map(len, asked["windows"])) + 8
    settings.model.path, settings.n_ctx, settings.n_parallel, settings.n_gpu_layers = asked["model"], longest, 1, 0
    settings.cpuparams.n_threads, settings.warmup, settings.verbosity = asked["threads"], False, 0
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return settings


def _likeliest(post: Callable[..., dict[str, Any]], window: list[int], asked: dict[str, Any]) -> list[dict[int, float]]:
    """Log-probabilities of the likeliest next tokens at every position but the last, one call for each."""
    # A plain token is forced, since tokens of half a character are held back; probabilities are those before that.
    forced = {"n_predict": 1, "n_probs": asked["top"], "logit_bias": [[asked["plain_token"], 1e6]], "temperature": 0}
    found = []
    for end in range(1, len(window)):
        said = post(prompt=window[:end], cache_prompt=True, **forced)
        likeliest = said["completion_probabilities"][0]["top_logprobs"]
        found.append({one["id"]: one["logprob"] for one in likeliest})
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
