"""Tasks beside lm-eval's own Hugging Face model: the same requests, model and dtype, in turn.

python benchmarks/tasks.py MODEL DATA
"""

import argparse
import json
import os
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from lm_eval.models.huggingface import HFLM
from rich.console import Console

from calibrant.evaluation.tasks.data_files import TASKS
from calibrant.evaluation.tasks.definitions import build_requests, load_tasks, quiet_lm_eval
from calibrant.evaluation.tasks.score import item_scores
from calibrant.evaluation.tasks.sharing_model import SharingModel
from calibrant.modeling.checkpoint import ModelFolder
from calibrant.modeling.tokenizer import Tokenizer
from calibrant.modeling.whole_model import load_whole


def run(model: Any, name: str, data: Path, items: int) -> tuple[float, list[Any], dict[str, list[Any]]]:
    """Seconds from requests to answers, the answers, and the items' scores."""
    members = load_tasks(name, data, items)
    requests = build_requests(members, items)
    with quiet_lm_eval():
        begin = time.perf_counter()
        answers = getattr(model, requests[0].request_type)(requests, disable_tqdm=True)
        seconds = time.perf_counter() - begin
    for request, answer in zip(requests, answers, strict=True):
        request.resps.append(answer)
    scores: dict[str, list[Any]] = {}
    for member in members:
        for metric, values in item_scores(member, items).items():
            scores.setdefault(metric, []).extend(values)
    return seconds, answers, scores


def compare(name: str, models: dict[str, Any], data: Path, items: int) -> dict[str, Any]:
    """One task: seconds of each model, the ratio to the fastest of lm-eval's, and what differs from each of them."""
    found = {label: run(model, name, data, items) for label, model in models.items()}
    seconds, answers, scores = found.pop("calibrant")
    main = {metric: values for metric, values in scores.items() if metric != "perplexity"}
    differing, largest = 0, 0.0
    for _, other_answers, other_scores in found.values():
        differing += sum(
            any(main[metric][item] != other_scores[metric][item] for metric in main)
            for item in range(len(next(iter(main.values()))))
        )
        if not isinstance(answers[0], str):
            largest = max(largest, *(abs(a[0] - b[0]) for a, b in zip(answers, other_answers, strict=True)))
        else:
            largest = max(largest, sum(a != b for a, b in zip(answers, other_answers, strict=True)))
    return {
        "items": len(next(iter(main.values()))),
        "requests": len(answers),
        "seconds": {"calibrant": seconds, **{label: other[0] for label, other in found.items()}},
        "ratio": min(other[0] for other in found.values()) / seconds,
        "items_with_other_scores": differing,
        "differing_texts" if isinstance(answers[0], str) else "largest_difference": largest,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path, help="a folder laid out as docs/tasks.md says")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--items", type=int, default=200, help="items of each task; of each subject for mmlu")
    parser.add_argument("--mmlu-items", type=int, default=4)
    parser.add_argument("--gsm8k-items", type=int, default=16)
    parser.add_argument("--batch-sizes", default="1,8", help="of lm-eval's model; gsm8k runs with the last one only")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "tasks.json")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    model = load_whole(ModelFolder(options.model, allow_quantized=True), options.device, "float32")
    with quiet_lm_eval():
        theirs = {
            f"lm-eval, batch {size}": HFLM(model, tokenizer=Tokenizer(options.model).hf, batch_size=int(size))
            for size in options.batch_sizes.split(",")
        }
    models = {"calibrant": SharingModel(model, Tokenizer(options.model), lambda _: None), **theirs}
    tasks: dict[str, Any] = {}
    for name in options.tasks.split(","):
        items = {"mmlu": options.mmlu_items, "gsm8k": options.gsm8k_items}.get(name, options.items)
        chosen = models if name != "gsm8k" else {label: models[label] for label in ("calibrant", list(theirs)[-1])}
        tasks[name] = compare(name, chosen, options.data, items)
        Console().print(name, tasks[name])
    total = {label: sum(task["seconds"].get(label, 0.0) for task in tasks.values()) for label in models}
    fastest = sum(min(v for label, v in task["seconds"].items() if label != "calibrant") for task in tasks.values())
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[1],
        "threads": torch.get_num_threads(),
        "device": options.device if options.device == "cpu" else torch.cuda.get_device_name(),
        "versions": {name: version(name) for name in ("torch", "transformers", "lm_eval")},
        "model": options.model.name,
        "dtype": "float32",
        "tasks": tasks,
        "seconds": total,
        "ratio": fastest / total["calibrant"],
    }
    Console().print(f"all tasks: {total}, ratio to the faster of lm-eval's {result['ratio']:.2f}")
    options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
