"""Asks transformers. Arguments: a file with the request, a file for the answer (``ask.py`` says what is in them)."""

import json
import resource
import sys
import time
from pathlib import Path

import torch
import transformers


def main(request: Path, answer: Path) -> None:
    asked = json.loads(request.read_text(encoding="utf-8"))
    begin = time.monotonic()
    options = {}
    if asked["dequantize"]:
        options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    load = getattr(transformers, asked["architecture"]).from_pretrained
    model = load(asked["model"], dtype=getattr(torch, asked["dtype"]), local_files_only=True, **options)
    model = model.to(asked["device"]).eval()
    loaded = time.monotonic() - begin
    with torch.inference_mode():
        positions = [_likeliest(model, window, asked["top"]) for window in asked["windows"]]
        prompt = torch.tensor([asked["prompt"]], device=asked["device"])
        settings = transformers.GenerationConfig(
            max_new_tokens=asked["new_tokens"], do_sample=False, eos_token_id=None, pad_token_id=0
        )
        begin = time.monotonic()
        written = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
        seconds = time.monotonic() - begin
    found = {
        "version": transformers.__version__,
        "positions": positions,
        "written": written[0, prompt.shape[1] :].tolist(),
        "load_seconds": loaded,
        "tokens_per_second": asked["new_tokens"] / seconds,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    answer.write_text(json.dumps(found), encoding="utf-8")


def _likeliest(model: torch.nn.Module, window: list[int], count: int) -> list[dict[int, float]]:
    """Log-probabilities of the likeliest next tokens at every position but the last."""
    device = next(model.parameters()).device
    logits = model(torch.tensor([window], device=device), use_cache=False).logits[0, :-1]
    values, ids = logits.double().log_softmax(-1).topk(count)
    return [dict(zip(one, of, strict=True)) for one, of in zip(ids.tolist(), values.tolist(), strict=True)]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
