"""llama.cpp itself, through the package xllamacpp, in a process of its own."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

_ASK = """
import json, sys, urllib.request
import xllamacpp

asked = json.loads(sys.stdin.read())
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.n_gpu_layers = asked["model"], 512, 1, 0
params.cpuparams.n_threads, params.warmup, params.verbosity = 1, False, 0
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(params)


def post(path, **body):
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(server.listening_address + path, json.dumps(body).encode(), headers)
    return json.loads(urllib.request.urlopen(request).read())


def tokens(text):
    return post("/tokenize", content=text, add_special=True, parse_special=False)["tokens"]


def probabilities(ids):
    # A plain token is forced, since tokens of half a character are held back; probabilities are those before that.
    settings = {"n_predict": 1, "n_probs": asked["vocabulary"], "logit_bias": [[asked["plain"], 1e6]]}
    said = post("/completion", prompt=ids, cache_prompt=False, temperature=0, **settings)
    return {one["id"]: one["logprob"] for one in said["completion_probabilities"][0]["top_logprobs"]}


def continuation(ids):
    said = post("/completion", prompt=ids, cache_prompt=False, temperature=0, n_predict=24, return_tokens=True)
    return said["tokens"]


found = {
    "tokens": [tokens(text) for text in asked["texts"]],
    "after": [probabilities(ids) for ids in asked["prompts"]],
    "written": [continuation(ids) for ids in asked["prompts"]] if asked["writes"] else [],
}
print("\\n" + json.dumps(found), flush=True)
"""


@dataclass(frozen=True)
class Said:
    """Token ids of texts; of each prompt the log-probability of every next token, and what was written after it."""

    tokens: list[list[int]]
    after: list[dict[int, float]]
    written: list[list[int]]


def ask(
    model: Path, vocabulary: int, plain: int, *, texts: list[str], prompts: list[list[int]], writes: bool = False
) -> Said:
    """Load ``model``, a GGUF file, tokenize ``texts``, and look at what follows ``prompts``.

    ``plain`` is a token of whole characters; ``writes`` says whether prompts are continued, greedily by 24 tokens.
    """
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("xllamacpp, which runs llama.cpp, is not installed")
    asked = {"model": str(model), "vocabulary": vocabulary, "plain": plain, "writes": writes}
    ran = subprocess.run(
        [sys.executable, "-c", _ASK],
        input=json.dumps({**asked, "texts": texts, "prompts": prompts}),
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = json.loads(ran.stdout.strip().splitlines()[-1])
    after = [{int(index): value for index, value in one.items()} for one in found["after"]]
    return Said(found["tokens"], after, found["written"])
