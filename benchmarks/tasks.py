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


def run(model: Any, name: str, data: Path, items: int) -> tuple[list[float], list[Any], dict[str, list[Any]]]:
    """Wall and processor seconds from requests to answers, the answers, and the items' scores."""
    members = load_tasks(name, data, items)
    requests = build_requests(members, items)
    with quiet_lm_eval():
        begin = time.perf_counter(), time.process_time()
        answers = getattr(model, requests[0].request_type)(requests, disable_tqdm=True)
        seconds = [time.perf_counter() - begin[0], time.process_time() - begin[1]]
    for request, answer in zip(requests, answers, strict=True):
        request.resps.append(answer)
    scores: dict[str, list[Any]] = {}
    for member in members:
        for metric, values in item_scores(member, items).items():
            scores.setdefault(metric, []).extend(values)
    return seconds, answers, scores


def compare(name: str, models: dict[str, Any], data: Path, items: int) -> dict[str, Any]:
    """One task: wall and processor seconds of each model, the ratios to the fastest of lm-eval's, and what differs."""
    found = {label: run(model, name, data, items) for label, model in models.items()}
    _, answers, scores = found["calibrant"]
    right = {metric: values for metric, values in scores.items() if metric != "perplexity"}
    count = len(next(iter(right.values())))
    others = [found[label] for label in models if label != "calibrant"]
    differing = sum(
        any(values[item] != other[metric][item] for metric, values in right.items())
        for _, _, other in others
        for item in range(count)
    )
    pairs = [pair for _, other, _ in others for pair in zip(answers, other, strict=True)]
    if isinstance(answers[0], str):
        answers_differ = {"texts_that_differ": sum(mine != theirs for mine, theirs in pairs)}
    else:
        answers_differ = {"largest_difference": max(abs(mine[0] - theirs[0]) for mine, theirs in pairs)}
    return {
        "items": count,
        "requests": len(answers),
        "seconds": {label: one[0][0] for label, one in found.items()},
        "processor_seconds": {label: one[0][1] for label, one in found.items()},
        "items_with_other_scores": differing,
        **answers_differ,
    }


def ratio(tasks: list[dict[str, Any]], what: str) -> float:
    """Seconds of the fastest of lm-eval's models in each task over ours."""
    theirs = sum(min(value for label, value in task[what].items() if label != "calibrant") for task in tasks)
    return float(theirs / sum(task[what]["calibrant"] for task in tasks))


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
        tasks[name] = task = compare(name, chosen, options.data, items)
        task |= {"ratio": ratio([task], "seconds"), "processor_ratio": ratio([task], "processor_seconds")}
        Console().print(name, task)
        done = list(tasks.values())
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
            "ratio": ratio(done, "seconds"),
            "processor_ratio": ratio(done, "processor_seconds"),
        }
        # After every task, so that a run that is stopped leaves what it measured.
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    Console().print(
        f"all tasks: {result['ratio']:.2f} times as fast, {result['processor_ratio']:.2f} by processor time"
    )


if __name__ == "__main__":
    main()
