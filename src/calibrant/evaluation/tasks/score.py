"""A model's scores on tasks: lm-eval's requests, our forward passes, lm-eval's metrics."""

import json
from collections import defaultdict
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from lm_eval.api.metrics import mean, perplexity, pooled_sample_stderr
from lm_eval.api.task import ConfigurableTask
from lm_eval.utils import handle_non_serializable, hash_string

from calibrant.errors import CalibrantError
from calibrant.evaluation.tasks.data_files import check_tasks
from calibrant.evaluation.tasks.definitions import build_requests, load_tasks, quiet_lm_eval
from calibrant.evaluation.tasks.results import Metric, TaskResult, standard_error
from calibrant.evaluation.tasks.sharing_model import SharingModel
from calibrant.modeling.tokenizer import Tokenizer
from calibrant.progress import Progress

# In this order; else the first of the definition.
_MAIN = ("acc_norm", "acc")


def score_tasks(
    model: transformers.PreTrainedModel,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    data: str | Path,
    limit: int | None,
    progress: Progress,
) -> tuple[TaskResult, ...]:
    """Score ``model`` on the first ``limit`` items of each task (of each subject of MMLU), as lm-eval does.

    ``data`` is the folder of the tasks' files, or "hub:". Metrics, standard errors of means and their pooling over the
    subjects of MMLU are lm-eval's; the standard error of a perplexity is that of its logarithm times the perplexity,
    where lm-eval draws bootstrap samples.

    Raises:
        CalibrantError: a task cannot run (see ``check_tasks``), or the model cannot be scored on it.
    """
    check_tasks(tasks, data)
    if model.config.is_encoder_decoder:
        raise CalibrantError("an encoder-decoder model cannot be scored on tasks; give a causal model")
    return tuple(_score(model, tokenizer, name, data, limit, progress) for name in tasks)


def _score(
    model: transformers.PreTrainedModel,
    tokenizer: Tokenizer,
    name: str,
    data: str | Path,
    limit: int | None,
    progress: Progress,
) -> TaskResult:
    members = load_tasks(name, data, limit)
    requests = build_requests(members, limit)
    with progress.task(name, len(requests), "requests") as task:
        scorer = SharingModel(model, tokenizer, task.advance)
        try:
            answers = getattr(scorer, requests[0].request_type)(requests, disable_tqdm=True)
        except CalibrantError as error:
            raise CalibrantError(f"{name}: {error}") from error
    for request, answer in zip(requests, answers, strict=True):
        request.resps.append(answer)
    scored = [item_scores(member, limit) for member in members]
    main = next((metric for metric in _MAIN if metric in scored[0]), next(iter(scored[0])))
    hashes = [_task_hash(member) for member in members]
    settings = members[0].config.dataset_kwargs or {}
    return TaskResult(
        name=name,
        metrics={metric: _metric(members[0], metric, [scores[metric] for scores in scored]) for metric in scored[0]},
        main=main,
        scores=tuple(float(score) for scores in scored for score in scores[main]),
        shots=members[0].config.num_fewshot or 0,
        truncated=scorer.truncated,
        version=str(members[0].VERSION),
        sha256=hashes[0] if len(members) == 1 else hash_string("".join(hashes)),
        lm_eval_version=version("lm_eval"),
        revision=settings.get("revision"),
    )


def item_scores(task: ConfigurableTask, limit: int | None) -> dict[str, list[Any]]:
    """What each metric of the definition gives for each item; answers with a named filter count apart."""
    by_item: dict[int, list[Any]] = defaultdict(list)
    for request in task.instances:
        by_item[request.doc_id].append(request)
    scores: dict[str, list[Any]] = defaultdict(list)
    with quiet_lm_eval():
        task.apply_filters()
        documents = list(task.doc_iterator(limit=limit))
        for name in task.instances[0].filtered_resps:
            for item, document in documents:
                requests = sorted(by_item[item], key=lambda request: int(request.idx))
                found = task.process_results(document, [request.filtered_resps[name] for request in requests])
                for metric, value in found.items():
                    scores[metric if name == "none" else f"{metric},{name}"].append(value)
    return dict(scores)


def _metric(task: ConfigurableTask, metric: str, of_members: list[list[Any]]) -> Metric:
    """The definition's aggregate; over the tasks of a group their mean weighted by items, as lm-eval's group has it."""
    aggregate = task.aggregation()[metric.split(",")[0]]
    values = np.array([value for scores in of_members for value in scores], dtype=np.float64)
    if aggregate is perplexity:
        value, error = float(perplexity(values)), standard_error(values)
        return Metric(value, None if error is None else value * error)
    if aggregate is not mean:
        raise CalibrantError(f"{task.task_name}: {metric} is no mean of items; this version of lm-eval does not fit")
    if len(of_members) == 1:
        return Metric(float(values.mean()), standard_error(values))
    errors = [standard_error(np.array(scores, dtype=np.float64)) for scores in of_members]
    known = [error for error in errors if error is not None]
    pooled = pooled_sample_stderr(known, [len(scores) for scores in of_members]) if len(known) == len(errors) else None
    return Metric(float(values.mean()), None if pooled is None else float(pooled))


def _task_hash(task: ConfigurableTask) -> str:
    """The hash that lm-eval writes into its results as ``task_hashes``."""
    first: dict[int, Any] = {}
    for request in task.instances:
        first.setdefault(request.doc_id, request)
    parts = []
    for request in first.values():
        document = json.dumps(request.doc, indent=2, default=handle_non_serializable, ensure_ascii=False)
        target = str(task.doc_to_target(request.doc))
        parts += [hash_string(document), hash_string(request.arguments[0]), hash_string(target)]
    # lm-eval lists every item once for each filter of its answers.
    return str(hash_string("".join(parts * len(task.instances[0].filtered_resps))))
