"""Self-calibration beside ``transformers``' generate: the same model, dtype, batch and sampling, in turn.

python benchmarks/generation.py MODEL
"""

import argparse
import json
import os
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers
from rich.console import Console

from calibrant.calibration.sources.self_calibration import TemperatureSchedule, generate_self_calibration
from calibrant.modeling.checkpoint import ModelFolder
from calibrant.modeling.tokenizer import Tokenizer
from calibrant.modeling.whole_model import load_whole
from calibrant.progress import NoProgress


def ours(model: transformers.PreTrainedModel, tokenizer: Tokenizer, rows: int, length: int, seed: int) -> float:
    """Seconds for ``rows`` full rows."""
    begin = time.perf_counter()
    generate_self_calibration(
        model,
        tokenizer,
        samples=rows,
        length=length,
        seed=seed,
        draw=0,
        schedule=TemperatureSchedule(),
        first_tokens="any",
        batch_size=rows,
        progress=NoProgress(),
        provenance={},
    )
    return time.perf_counter() - begin


def theirs(model: transformers.PreTrainedModel, start: int, rows: int, length: int, seed: int) -> float:
    """Seconds for the same with ``generate``; no end token, so that no row is cut short."""
    torch.manual_seed(seed)
    ids = torch.full((rows, 1), start)
    begin = time.perf_counter()
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        max_new_tokens=length - 1,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert made.shape == (rows, length)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "generation.json")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    folder, tokenizer = ModelFolder(options.model), Tokenizer(options.model)
    fast, plain = (load_whole(folder, "cpu", options.dtype) for _ in range(2))
    plain.generation_config.eos_token_id = None
    ours(fast, tokenizer, 2, 4, 0)  # compile
    seconds: dict[str, list[float]] = {"calibrant": [], "transformers": []}
    for index in range(options.rounds):
        seconds["calibrant"].append(ours(fast, tokenizer, options.rows, options.length, index))
        seconds["transformers"].append(theirs(plain, tokenizer.start_id, options.rows, options.length, index))
        Console().print({name: round(values[-1], 1) for name, values in seconds.items()})
    tokens = options.rows * options.length
    rates = {name: tokens / min(values) for name, values in seconds.items()}
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "cores": os.cpu_count(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "model": options.model.name,
        "rows": options.rows,
        "length": options.length,
        "dtype": options.dtype,
        "units": torch.backends.cpu.get_cpu_capability(),
        "seconds": seconds,
        "tokens_per_second": rates,
        "ratio": rates["calibrant"] / rates["transformers"],
    }
    Console().print(f"tokens a second: {rates}, ratio {result['ratio']:.2f}")
    options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
