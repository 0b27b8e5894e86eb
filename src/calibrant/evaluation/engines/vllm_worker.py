"""Asks vLLM. Arguments: a file with the request, a file for the answer (``ask.py`` says what is in them)."""

import json
import resource
import sys
import time
from pathlib import Path

# vLLM does not start where less of the memory is free; it needs little beside the weights for windows this short.
_MEMORY_SHARE = 0.7


def main(request: Path, answer: Path) -> None:
    # vLLM's processes import this file again, and must not import vLLM before it has set them up.
    import vllm

    asked = json.loads(request.read_text(encoding="utf-8"))
    begin = time.monotonic()
    longest = max(len(asked["prompt"]) + asked["new_tokens"], *map(len, asked["windows"])) + 1
    engine = vllm.LLM(
        model=asked["model"],
        dtype=asked["dtype"],
        enforce_eager=True,
        max_model_len=longest,
        max_logprobs=asked["top"],
        enable_prefix_caching=False,
        gpu_memory_utilization=_MEMORY_SHARE,
    )
    loaded = time.monotonic() - begin
    look = vllm.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=asked["top"], detokenize=False)
    windows = engine.generate([{"prompt_token_ids": window} for window in asked["windows"]], look, use_tqdm=False)
    write = vllm.SamplingParams(temperature=0, max_tokens=asked["new_tokens"], ignore_eos=True, detokenize=False)
    begin = time.monotonic()
    written = engine.generate([{"prompt_token_ids": asked["prompt"]}], write, use_tqdm=False)
    seconds = time.monotonic() - begin
    del engine  # ends its processes, whose memory is known then
    memory = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    found = {
        "version": vllm.__version__,
        # The first position has no prediction.
        "positions": [
            [{int(token): one.logprob for token, one in place.items()} for place in window.prompt_logprobs[1:]]
            for window in windows
        ],
        "written": list(written[0].outputs[0].token_ids),
        "load_seconds": loaded,
        "tokens_per_second": asked["new_tokens"] / seconds,
        "peak_bytes": max(memory) * 1024,
    }
    answer.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
