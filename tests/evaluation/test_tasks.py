"""Tasks: lm-eval's definitions on local files, its Hugging Face model's numbers, paired comparisons."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import lm_eval.evaluator
import lm_eval.tasks
import pytest
import torch
import transformers as hf
from datasets import Dataset, DatasetDict
from lm_eval.api.group import Group
from lm_eval.api.instance import Instance
from lm_eval.config.group import AggMetricConfig
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.huggingface import HFLM

import calibrant as cb
from calibrant.evaluation.tasks.batches import batches, shared_prefixes
from calibrant.evaluation.tasks.data_files import TASKS, check_tasks, read_split
from calibrant.evaluation.tasks.definitions import build_requests, load_tasks
from calibrant.evaluation.tasks.results import Metric, TaskResult, compare_tasks
from calibrant.evaluation.tasks.score import score_tasks
from calibrant.evaluation.tasks.sharing_model import SharingModel
from calibrant.modeling.tokenizer import Tokenizer
from calibrant.progress import NoProgress
from tests.conftest import ARCHITECTURES, CONTEXT, VOCABULARY, random_set, write_tokenizer
from tests.evaluation.task_rows import FILES, write_rows

_LONG = 2048


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="session")
def reader(model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with a context that prompts fit into; its rotary positions know no limit."""
    folder = tmp_path_factory.mktemp("reader")
    for file in model_folder("llama").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": _LONG}))
    return folder


@pytest.mark.parametrize("name", TASKS)
def test_prompts_choices_and_targets_are_those_of_lm_eval_on_the_hubs_rows(
    name: str, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = load_tasks(name, data)
    build_requests(ours, None)

    def hub(path: str, name: str | None = None, **_: object) -> DatasetDict:
        del path
        rows = {split: found for _, _, split, found in FILES[task]}
        known = {
            split: Dataset.from_list([row for row in found if row.get("subject", name) == name])
            if split in ("dev", "test") and task == "mmlu"
            else Dataset.from_list(found)
            for split, found in rows.items()
        }
        empty = Dataset.from_list([])
        return DatasetDict({split: known.get(split, empty) for split in ("train", "validation", "test", "dev")})

    task = name
    monkeypatch.setattr("datasets.load_dataset", hub)
    wanted = _manager().load([name])["tasks"]
    assert [task.task_name for task in ours] == sorted(wanted)
    assert len(ours) == (57 if name == "mmlu" else 1)
    for mine in ours:
        theirs = wanted[mine.task_name]
        theirs.set_fewshot_seed(1234)
        theirs.build_all_requests()
        assert [(one.arguments, one.doc, one.idx) for one in mine.instances] == [
            (one.arguments, one.doc, one.idx) for one in theirs.instances
        ]
        for document in mine.eval_docs:
            assert mine.doc_to_target(document) == theirs.doc_to_target(document)
        assert mine.aggregation() == theirs.aggregation()
        assert (mine.VERSION, mine.config.num_fewshot) == (theirs.VERSION, theirs.config.num_fewshot)


def _manager() -> lm_eval.tasks.TaskManager:
    """lm-eval's, without the thousands of definitions that no test reads."""
    root = Path(lm_eval.tasks.__file__).parent
    folders = {str(root / files.definition) for files in TASKS.values()}
    return lm_eval.tasks.TaskManager(include_defaults=False, include_path=sorted(folders))


def _long_context(architecture: str) -> hf.PreTrainedModel:
    size = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if architecture == "mamba":
            return hf.MambaForCausalLM(hf.MambaConfig(**size, state_size=4)).eval()
        if architecture == "mamba2":
            config = hf.Mamba2Config(**size, num_heads=8, head_dim=16, state_size=8, n_groups=1, chunk_size=8)
            return hf.Mamba2ForCausalLM(config).eval()
        return ARCHITECTURES[architecture]().eval()


def _requests(kind: str, arguments: list[tuple[object, ...]]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=given, idx=0, metadata=("t", number, 1))
        for number, given in enumerate(arguments)
    ]


def _pairs() -> list[tuple[object, ...]]:
    """Contexts with several answers, answers that begin alike, one token each, none before, and too long ones."""
    draw = random.Random(0)

    def text(length: int) -> str:
        return "".join(draw.choice("abcdefgh ") for _ in range(length)).strip() or "a"

    pairs: list[tuple[object, ...]] = []
    for _ in range(6):
        context = text(draw.randrange(12, 40))
        pairs += [(context, f" {text(draw.randrange(1, 12))}") for _ in range(draw.randrange(1, 5))]
    context = text(30)
    pairs += [(context, "a"), (context, "b"), (context, "abc"), (context, "abd"), (context, "a"), (f"{context} ", "b")]
    pairs += [("", text(9)), ("", text(4)), (text(CONTEXT + 10), " abc"), (text(3 * CONTEXT), " abc")]
    return pairs


@pytest.mark.parametrize("architecture", [
    "llama", "mistral", "gemma2", "gemma3", "gpt2", "opt", "bloom", "falcon", "mixtral", "mamba", "mamba2",
])  # fmt: skip
def test_answers_are_those_of_lm_evals_own_model(architecture: str, tmp_path: Path) -> None:
    """Gemma 3's window is 16 tokens, shorter than the contexts; the state-space models have no keys and values."""
    write_tokenizer(tmp_path)
    model = _long_context(architecture)
    options = {"max_length": CONTEXT} if architecture in ("bloom", "mamba", "mamba2") else {}
    theirs = HFLM(model, tokenizer=Tokenizer(tmp_path).hf, batch_size=1, **options)
    ours = SharingModel(model, Tokenizer(tmp_path), lambda _: None)
    ours._max_length = theirs.max_length
    pairs = _pairs()
    found = ours.loglikelihood(_requests("loglikelihood", pairs), disable_tqdm=True)
    wanted = theirs.loglikelihood(_requests("loglikelihood", pairs), disable_tqdm=True)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in wanted], abs=2e-4, rel=1e-5)
    assert ours.truncated == 2
    texts = [(context,) for context, _ in pairs if context]
    assert ours.loglikelihood_rolling(_requests("loglikelihood_rolling", texts), disable_tqdm=True) == pytest.approx(
        theirs.loglikelihood_rolling(_requests("loglikelihood_rolling", texts), disable_tqdm=True), abs=1e-3, rel=1e-5
    )


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_generated_answers_are_those_of_lm_evals_own_model(architecture: str, tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    model = _long_context(architecture)
    theirs = HFLM(model, tokenizer=Tokenizer(tmp_path).hf, batch_size=1)
    ours = SharingModel(model, Tokenizer(tmp_path), lambda _: None)
    given = [(str(context), {"until": [until], "max_gen_toks": 12, "do_sample": False, "temperature": 0.0})
             for context, _ in _pairs()[::4] if context for until in ("e", "zz")]  # fmt: skip
    found = ours.generate_until(_requests("generate_until", given), disable_tqdm=True)
    assert found == theirs.generate_until(_requests("generate_until", given), disable_tqdm=True)


def test_what_requests_share_is_computed_once(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    model, computed, scored = _long_context("llama"), [], []
    ours = SharingModel(model, Tokenizer(tmp_path), lambda _: None)
    model.get_input_embeddings().register_forward_pre_hook(lambda _, given: computed.append(given[0].numel()))
    model.lm_head.register_forward_hook(lambda _, __, logits: scored.append(logits.shape[:-1].numel()))
    ours.loglikelihood(_requests("loglikelihood", [("x" * 40, f" {end}" * 3) for end in "abcd"]), disable_tqdm=True)
    # 39 tokens once, then for each answer the context's last token and all of its own but the last.
    assert sum(computed) == 39 + 4 * 6
    assert sum(scored) == 4 * 6


def test_a_model_whose_states_cannot_be_copied_runs_every_request_alone(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    model = _long_context("llama")
    wanted = SharingModel(model, Tokenizer(tmp_path), lambda _: None)
    forward = model.forward

    def forgetful(*arguments: object, **options: object) -> object:
        return forward(*arguments, **{**options, "past_key_values": None})

    model.forward = forgetful
    ours = SharingModel(model, Tokenizer(tmp_path), lambda _: None)
    requests = _requests("loglikelihood", _pairs())
    model.forward = forward
    expected = wanted.loglikelihood(requests, disable_tqdm=True)
    model.forward = forgetful
    found = ours.loglikelihood(requests, disable_tqdm=True)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)


@pytest.mark.parametrize("name", ["arc_easy", "lambada_openai", "winogrande", "mmlu", "gsm8k", "boolq"])
def test_results_are_those_of_lm_eval(
    name: str, data: Path, reader: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")  # lm-eval's forks of a process with threads may never end
    model = hf.AutoModelForCausalLM.from_pretrained(reader).eval()
    limit = 2 if name == "mmlu" else None
    found = score_tasks(model, Tokenizer(reader), [name], data, limit, NoProgress())[0]
    tasks = {task.task_name: task for task in load_tasks(name, data)}
    group = Group(name, aggregate_metric_list=[AggMetricConfig(metric="acc", weight_by_size=True)])
    for task in tasks.values():
        group.add(task)
    theirs = lm_eval.evaluator.evaluate(
        HFLM(model, tokenizer=Tokenizer(reader).hf, batch_size=1),
        {"tasks": tasks, "groups": {name: group} if name == "mmlu" else {}},
        limit=limit,
        bootstrap_iters=2,
    )
    result = theirs["results"][name]
    for metric, own in found.metrics.items():
        key = metric if "," in metric else f"{metric},none"
        assert own.value == pytest.approx(result[key], rel=1e-4)
        if metric != "perplexity":
            assert own.standard_error == pytest.approx(result[key.replace(",", "_stderr,")])
    tracker = EvaluationTracker(output_path=str(tmp_path))
    tracker.general_config_tracker.model_name_sanitized = "m"
    tracker.save_results_aggregated(dict(theirs), theirs["samples"])
    written = json.loads(next(tmp_path.rglob("results_*.json")).read_text())["task_hashes"]
    if name != "mmlu":
        assert found.sha256 == written[name]
    assert found.shots == (5 if name == "gsm8k" else 0)
    assert found.items == len(found.scores) == result["sample_len"]
    assert found.items == (114 if name == "mmlu" else len(tasks[name].eval_docs))


def test_the_error_of_a_perplexity_is_that_of_its_logarithm(data: Path, reader: Path) -> None:
    model = hf.AutoModelForCausalLM.from_pretrained(reader).eval()
    found = score_tasks(model, Tokenizer(reader), ["lambada_openai"], data, None, NoProgress())[0].metrics["perplexity"]
    ours = SharingModel(model, Tokenizer(reader), lambda _: None)
    tasks = load_tasks("lambada_openai", data)
    values = torch.tensor([value for value, _ in ours.loglikelihood(build_requests(tasks, None), disable_tqdm=True)])
    assert found.value == pytest.approx(float((-values.mean()).exp()), rel=1e-5)
    assert found.standard_error == pytest.approx(float(found.value * values.std() / len(values) ** 0.5), rel=1e-4)


def _result(scores: list[float], sha256: str = "h") -> TaskResult:
    return TaskResult("piqa", {"acc": Metric(0.0, None)}, "acc", tuple(scores), 0, 0, "1", sha256, "0")


def test_mcnemar_equals_its_closed_form() -> None:
    draw = random.Random(3)
    model = [float(draw.random() < 0.5) for _ in range(60)]
    original = [float(draw.random() < 0.7) for _ in range(60)]
    one = compare_tasks([_result(model)], [_result(original)])[0]
    pairs = list(zip(model, original, strict=True))
    gained, lost = pairs.count((1.0, 0.0)), pairs.count((0.0, 1.0))
    assert (one.both_right, one.only_model_right, one.only_original_right, one.both_wrong) == (
        pairs.count((1.0, 1.0)), gained, lost, pairs.count((0.0, 0.0)),
    )  # fmt: skip
    tail = sum(math.comb(gained + lost, k) for k in range(min(gained, lost) + 1)) / 2 ** (gained + lost)
    assert one.p_value == pytest.approx(min(1.0, 2 * tail))
    assert one.difference == pytest.approx((gained - lost) / 60)
    variance = (gained + lost - (gained - lost) ** 2 / 60) / 59
    assert one.standard_error == pytest.approx(math.sqrt(variance / 60))
    assert one.low < one.difference < one.high
    same = compare_tasks([_result(model)], [_result(model)])[0]
    assert (same.p_value, same.difference, same.standard_error) == (1.0, 0.0, 0.0)


def test_results_on_other_items_are_not_compared() -> None:
    with pytest.raises(cb.CalibrantError, match="piqa: the results are not of the same items"):
        compare_tasks([_result([1.0])], [_result([1.0], "other")])
    with pytest.raises(cb.CalibrantError, match="not of the same tasks"):
        compare_tasks([_result([1.0])], [])


@pytest.mark.parametrize("checkpoint_format", ["compressed-tensors", "gptq", "awq"])
def test_every_output_format_is_scored_against_the_original(
    checkpoint_format: str, data: Path, reader: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = "gptq-w4a16-g32"
    cb.compress(
        reader, output=tmp_path / "out", recipe=recipe, calibration=random_set(reader),
        checkpoint_format=checkpoint_format, dtype="float32",
    )  # fmt: skip
    found = cb.evaluate(tmp_path / "out", against=reader, text=None, tasks=["arc_easy", "copa"], data=data, limit=3)
    assert (found.windows, found.perplexity) == (0, None)
    assert [result.name for result in found.tasks] == [result.name for result in found.original_tasks]
    assert [(one.name, one.metric, one.items) for one in found.task_comparisons] == [
        ("arc_easy", "acc_norm", 3), ("copa", "acc", 3),
    ]  # fmt: skip
    again = cb.evaluate(reader, against=reader, text=None, tasks=["arc_easy"], data=data, limit=3)
    assert again.tasks == again.original_tasks == found.original_tasks[:1]
    assert capfd.readouterr() == ("", "")


def test_the_limit_of_tasks_takes_precedence(data: Path, reader: Path) -> None:
    found = cb.evaluate(
        reader, text=cb.Corpus(["many words " * 99]), length=16, tasks=["copa", "rte"], data=data, limit=3, task_limit=1
    )
    assert found.windows == 3
    assert [result.items for result in found.tasks] == [1, 1]


@pytest.mark.parametrize(("tasks", "where", "said"), [
    (["piqa", "arc"], "data", "arc: no such task; there are arc_challenge, arc_easy, boolq"),
    (["piqa", "piqa"], "data", "a task is named twice"),
    (["piqa"], None, "piqa: no data; name the folder of the tasks' files with `data`"),
    (["piqa"], "nowhere", "nowhere: no such folder"),
    (["piqa", "gsm8k"], "partial", "train.jsonl: no such file .nor train.jsonl.gz., and the task gsm8k reads"),
])  # fmt: skip
def test_bad_plans_are_refused_before_a_model_is_read(
    tasks: list[str], where: str | None, said: str, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "partial" / "piqa").mkdir(parents=True)
    (tmp_path / "partial" / "piqa" / "validation.jsonl").write_text("")
    place = data if where == "data" else where and tmp_path / where
    for use in (check_tasks, lambda names, folder: cb.evaluate("no model", tasks=names, data=folder)):
        with pytest.raises(cb.CalibrantError, match=said):
            use(tasks, place)


def test_nothing_to_evaluate_is_said() -> None:
    with pytest.raises(cb.CalibrantError, match="nothing to evaluate"):
        cb.evaluate("no model", text=None)


@pytest.mark.parametrize(("written", "said"), [
    ("", "has no rows"),
    ('{"goal": "a", "sol1": "b", "sol2": "c"}\n', "line 1: not a row of piqa: it lacks 'label'"),
    ('{"goal": 1\n', "line 1: not JSON Lines"),
    ("[1]\n", "line 1: not a row of piqa, but a list"),
    ('{"goal": null, "sol1": "b", "sol2": "c", "label": 0}\n', "line 1: not a row of piqa: its goal is empty"),
])  # fmt: skip
def test_damaged_files_get_one_sentence(written: str, said: str, reader: Path, tmp_path: Path) -> None:
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "validation.jsonl").write_text(written)
    with pytest.raises(cb.CalibrantError, match=said):
        cb.evaluate(reader, text=None, tasks=["piqa"], data=tmp_path)


def test_answers_longer_than_the_context_are_refused(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "piqa").mkdir()
    row = {"goal": "a", "sol1": "b" * 100, "sol2": "c", "label": 0}
    (tmp_path / "piqa" / "validation.jsonl").write_text(json.dumps(row))
    with pytest.raises(cb.CalibrantError, match="piqa: an answer of 101 tokens is longer than the model's context"):
        cb.evaluate(llama, text=None, tasks=["piqa"], data=tmp_path)


def test_contexts_without_room_for_an_answer_are_refused(llama: Path, data: Path) -> None:
    with pytest.raises(
        cb.CalibrantError, match="gsm8k: answers of up to 256 tokens do not fit the model's context of 64"
    ):
        cb.evaluate(llama, text=None, tasks=["gsm8k"], data=data)


def test_tasks_from_the_hub_are_loaded_at_their_revision(monkeypatch: pytest.MonkeyPatch, reader: Path) -> None:
    asked = []

    class Hub:
        def dataset_info(self, path: str) -> object:
            return type("Info", (), {"sha": f"commit of {path}"})

    def load(path: str, name: str | None, revision: str) -> DatasetDict:
        asked.append((path, name, revision))
        rows = FILES["piqa"][0][3]
        return DatasetDict({split: Dataset.from_list(rows) for split in ("train", "validation")})

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr("datasets.load_dataset", load)
    found = cb.evaluate(reader, text=None, tasks=["piqa"], data="hub:", limit=2).tasks[0]
    assert asked == [("baber/piqa", None, "commit of baber/piqa")]
    assert (found.revision, found.items) == ("commit of baber/piqa", 2)


def test_groups_share_true_prefixes_and_save_tokens() -> None:
    draw = random.Random(1)
    stems = [tuple(draw.randrange(9) for _ in range(draw.randrange(5, 40))) for _ in range(20)]
    inputs = [(*draw.choice(stems), *(draw.randrange(9) for _ in range(draw.randrange(1, 9)))) for _ in range(100)]
    inputs = list(dict.fromkeys(inputs))
    scored = [draw.randrange(1, 4) for _ in inputs]
    groups = shared_prefixes(inputs, scored)
    assert sorted(row for group in groups for row in group.rows) == list(range(len(inputs)))
    for group in groups:
        assert len({inputs[row][: group.prefix] for row in group.rows}) == 1
        assert all(group.prefix + scored[row] <= len(inputs[row]) for row in group.rows)
    cost = sum(g.prefix + sum(len(inputs[row]) - g.prefix for row in g.rows) for g in groups)
    assert cost < sum(map(len, inputs)) * 0.6


def test_batches_hold_every_row_within_the_limit() -> None:
    draw = random.Random(2)
    lengths = [draw.randrange(1, 90) for _ in range(200)] + [700]
    found = list(batches(lengths, 512))
    assert sorted(row for batch in found for row in batch) == list(range(len(lengths)))
    assert all(len(batch) == 1 or len(batch) * max(lengths[row] for row in batch) <= 512 for batch in found)
    assert sum(len(batch) * max(lengths[row] for row in batch) for batch in found) < 1.1 * sum(lengths)


def test_json_lines_are_not_wikitexts_raw_file(reader: Path, tmp_path: Path) -> None:
    (tmp_path / "wiki.jsonl").write_text('{"text": "a b c"}\n' * 200)
    with pytest.raises(cb.CalibrantError, match=r"wiki.jsonl: JSON Lines, where `wikitext` is WikiText's raw file"):
        cb.evaluate(reader, text=None, wikitext=tmp_path / "wiki.jsonl")


def test_wikitext_is_measured_as_the_papers_do(reader: Path, tmp_path: Path) -> None:
    """The loop of GPTQ's scripts, on rows as the hub's data set has them."""
    rows = ["", " = Title = \n", "", *(f" Sentence {n} of the text . \n" for n in range(180)), ""]
    (tmp_path / "wiki.raw").write_text("".join(row or " \n" for row in rows))
    found = cb.evaluate(reader, text=None, wikitext=tmp_path / "wiki.raw").wikitext
    model = hf.AutoModelForCausalLM.from_pretrained(reader).eval()
    ids = hf.AutoTokenizer.from_pretrained(reader)("\n\n".join(rows), return_tensors="pt").input_ids
    count = ids.numel() // _LONG
    losses = []
    with torch.no_grad():
        for index in range(count):
            batch = ids[:, index * _LONG : (index + 1) * _LONG]
            logits = model(batch).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits.reshape(-1, VOCABULARY), batch[:, 1:].reshape(-1))
            losses.append(loss.float() * _LONG)
    assert found is not None
    assert (found.windows, found.length) == (count, _LONG)
    assert count >= 2
    assert found.perplexity.value == pytest.approx(math.exp(sum(losses) / (count * _LONG)), rel=1e-5)


@pytest.mark.parametrize(("name", "items"), [
    ("arc_easy", 2376), ("arc_challenge", 1172), ("boolq", 3270), ("hellaswag", 10042), ("lambada_openai", 5153),
    ("openbookqa", 500), ("piqa", 1838), ("rte", 277), ("winogrande", 1267), ("copa", 100), ("gsm8k", 1319),
    ("mmlu", 14042),
])  # fmt: skip
def test_the_shared_data_is_read_whole(name: str, items: int, shared_data: Path) -> None:
    check_tasks([name], shared_data)
    assert sum(len(read_split(name, split, shared_data)) for split in ("validation", "test")) == items
