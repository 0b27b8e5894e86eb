"""Studies of a tiny model: what runs, what is not run again, what is shared, and what a failure stops."""

import contextlib
import fcntl
import importlib.util
import multiprocessing
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file, save_file

import calibrant as cb
from calibrant.progress import NoProgress
from calibrant.study.cache import Cache
from calibrant.study.resolve import resolve
from tests.evaluation.task_rows import write_rows

from .small_study import write_plan

_TIMES = ("seconds", "set_seconds")


def content(study: Path) -> list[Any]:
    """Everything in a store but the times, and the plan's path."""
    with contextlib.closing(sqlite3.connect(study / "study.sqlite")) as connection:
        found = [list(connection.execute(f"SELECT * FROM {table}")) for table in ("cells", "measures", "items")]
    return [sorted(rows, key=str) for rows in found]


def results(cache: Path) -> set[str]:
    return {path.name for path in (cache / "results").glob("*.json")}


def test_a_study_goes_on_where_it_was_and_shares_what_is_the_same(folder: Path, whole: Path) -> None:
    cache = Path(shutil.copytree(whole.parent / "cache", folder / "cache"))
    made = results(cache)
    ran = cb.run_study(folder / "study.yaml", cache=cache)
    assert ran.cells == 6
    assert cb.Study(ran.folder).counts() == {"done": 6, "failed": 0, "waiting": 0}
    assert content(ran.folder) == content(whole)
    assert results(cache) == made

    write_plan(folder / "study.yaml", draws=2)
    larger = cb.run_study(folder / "study.yaml", cache=cache)
    assert larger.cells == 10
    assert len(results(cache) - made) == 2 + 2 * 4  # of sources: sets; of cells: compressions and texts
    assert set(content(whole)[1]) < set(content(larger.folder)[1])


def test_scores_are_those_of_the_commands(folder: Path, llama: Path) -> None:
    write_plan(folder / "study.yaml", recipes=["wanda.yaml"], keep_outputs=True)
    ran = cb.run_study(folder / "study.yaml", cache=folder / "cache")
    study = cb.Study(ran.folder)
    data = cb.select(folder / "text.txt", tokenizer=llama, samples=4, length=16, stride=4)
    cb.compress(llama, recipe=folder / "wanda.yaml", calibration=data, output=folder / "out", dtype="float32")
    text = {"text": folder / "text.txt", "length": 16, "limit": 3}
    expected = cb.evaluate(folder / "out", against=llama, **text)
    assert expected.divergence is not None
    found = {one.measure: one.value for one in study.scores() if one.source == "text" and one.repeat == 0}
    assert found["kl"] == pytest.approx(expected.divergence.kl_mean, rel=1e-4)
    assert found["perplexity"] == pytest.approx(expected.perplexity.value, rel=1e-6)
    original = {one.measure: one.value for one in study.originals()}
    assert original == {"perplexity": pytest.approx(cb.evaluate(llama, **text).perplexity.value, rel=1e-6)}
    weights = (folder / "out" / "model.safetensors").read_bytes()
    kept = [path.read_bytes() for path in (folder / "cache" / "outputs").glob("*/model.safetensors")]
    assert weights in kept


def test_labels_and_kept_outputs_belong_to_a_cell(folder: Path, whole: Path) -> None:
    cache = Path(shutil.copytree(whole.parent / "cache", folder / "cache"))
    text = {"corpus": "text.txt", "length": 16, "windows": 3}
    write_plan(folder / "study.yaml", recipes="wanda.yaml", repeat=False)
    ran = cb.run_study(folder / "study.yaml", cache=cache)
    write_plan(folder / "study.yaml", texts={"renamed": text}, keep_outputs=True)
    cb.run_study(folder / "study.yaml", cache=cache)
    assert {one.on for one in cb.Study(ran.folder).scores() if one.measure == "kl"} == {"renamed"}
    assert len(list((cache / "outputs").glob("*/config.json"))) == 2


def test_a_renamed_recipe_runs_nothing_again(folder: Path, whole: Path) -> None:
    cache = Path(shutil.copytree(whole.parent / "cache", folder / "cache"))
    made = results(cache)
    (folder / "renamed.yaml").write_text(
        (folder / "wanda.yaml").read_text().replace("name: wanda\n", "name: renamed\n")
    )
    write_plan(folder / "study.yaml", recipes=["rtn.yaml", "renamed.yaml"])
    ran = cb.run_study(folder / "study.yaml", cache=cache)
    assert results(cache) == made
    assert {one.recipe for one in cb.Study(ran.folder).scores()} == {"rtn", "renamed"}


def test_tasks_are_measured_as_evaluate_does(folder: Path, llama: Path) -> None:
    write_rows(folder / "data")
    tasks = {"names": ["copa", "arc_easy"], "data": "data", "limit": 3}
    changes = {"sources": {"text": {"corpus": "text.txt"}}, "recipes": ["wanda.yaml"], "repeat": False}
    write_plan(folder / "study.yaml", tasks=tasks, keep_outputs=True, **changes)
    ran = cb.run_study(folder / "study.yaml", cache=folder / "cache")
    assert ran.failures == []
    (output,) = (path.parent for path in (folder / "cache" / "outputs").glob("*/config.json"))
    expected = cb.evaluate(output, against=llama, text=None, tasks=tasks["names"], data=folder / "data", task_limit=3)
    study = cb.Study(ran.folder)
    for scores, results in ((study.scores(), expected.tasks), (study.originals(), expected.original_tasks)):
        found = {(one.on, one.measure): one.value for one in scores}
        for result in results:
            for name, metric in result.metrics.items():
                assert found[result.name, name] == pytest.approx(metric.value), (result.name, name)
    assert {name: about["sha256"] for name, about in study.tasks.items()} == {
        one.name: one.sha256 for one in expected.tasks
    }


def test_a_set_counts_once(folder: Path) -> None:
    (folder / "one.txt").write_text((folder / "text.txt").read_text()[:70])
    one = {"corpus": "one.txt", "windows": "document"}
    sources = {"one": one, "vocabulary": {"strategy": "vocabulary"}}
    write_plan(folder / "study.yaml", sources=sources, samples=1, seeds=[0, 1], recipes="wanda.yaml", repeat=False)
    ran = cb.run_study(folder / "study.yaml", cache=folder / "cache")
    study = cb.Study(ran.folder)
    assert [cell.seed for cell in study.same_sets()] == [1]
    kl = next(one for one in study.analyse().settings if one.setting.measure == "kl")
    assert {source.source: source.description.n for source in kl.sources} == {"one": 1, "vocabulary": 2}
    assert kl.missing == ()


def test_a_set_with_targets_is_made_again_for_other_texts_only(folder: Path) -> None:
    """Not for the same texts in another folder."""
    texts = (folder / "text.txt").read_text().splitlines()

    def ran(name: str, text: str) -> tuple[str, str]:
        (folder / "targets" / name).mkdir(parents=True)
        (folder / "targets" / name / "target.txt").write_text(text)
        source = {"corpus": "text.txt", "strategy": "acdm", "targets": [f"targets/{name}/target.txt"]}
        write_plan(folder / "study.yaml", name=name, sources={"near": source}, recipes="rtn.yaml", repeat=False)
        made = cb.run_study(folder / "study.yaml", cache=folder / "cache")
        assert made.failures == []
        with contextlib.closing(sqlite3.connect(made.folder / "study.sqlite")) as store:
            (found,) = store.execute("SELECT set_key, set_sha256 FROM cells WHERE source = 'near'")
            return found

    first = ran("one", texts[3])
    assert ran("moved", texts[3]) == first
    other = ran("other", texts[-1])
    assert other[0] != first[0]
    assert other[1] != first[1]


def test_texts_that_change_while_a_study_runs_make_no_result(folder: Path) -> None:
    """A result of other texts than its key stands for would be taken for it by every later study."""
    (folder / "moved.txt").write_text((folder / "text.txt").read_text())
    sources = {
        "text": {"corpus": "moved.txt"},
        "near": {"corpus": "text.txt", "strategy": "acdm", "targets": ["moved.txt"]},
    }
    write_rows(folder / "tasks")
    write_plan(
        folder / "study.yaml",
        sources=sources,
        texts={"held-out": {"corpus": "moved.txt", "length": 16, "windows": 3}},
        tasks={"names": ["copa"], "data": "tasks"},
    )
    cache = Cache(folder / "cache")
    work = resolve(cb.load_study_plan(folder / "study.yaml"), cache, NoProgress()).cells
    steps = {step.key: step for one in work for step in one.needs}
    (folder / "moved.txt").write_text("the text is another one\n" * 60)
    for file in (folder / "tasks" / "copa").iterdir():
        file.write_text(file.read_text().splitlines()[0] + "\n")
    assert len(steps) == 4
    for step in steps.values():
        with pytest.raises(cb.CalibrantError, match="changed while the study ran"):
            step.run(cache)
        assert not step.is_done(cache)


def test_more_texts_leave_the_measures_where_they_are(
    folder: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(whole, folder / "small")
    before = content(folder / "small")
    text = {"corpus": "text.txt", "length": 16, "windows": 2}
    texts = {"held-out": {"corpus": "text.txt", "length": 16, "windows": 3}, "more": text}
    write_plan(folder / "study.yaml", texts=texts)
    with monkeypatch.context() as interrupted:
        interrupted.setattr("calibrant.study.run._run", lambda *_: pytest.exit("interrupted"))
        with pytest.raises(BaseException, match="interrupted"):
            cb.run_study(folder / "study.yaml", cache=folder / "cache")
    study = cb.Study(folder / "small")
    assert study.counts() == {"done": 0, "failed": 0, "waiting": 6}
    assert content(folder / "small")[1:] == before[1:]
    assert study.analyse().settings == cb.Study(whole).analyse().settings
    assert cb.run_study(folder / "study.yaml", cache=folder / "cache").failures == []
    other = cb.run_study(folder / "study.yaml", cache=folder / "other cache", output=folder / "other")
    assert content(folder / "small") == content(other.folder)
    assert {one.on for one in cb.Study(folder / "small").scores()} == {"held-out", "more", ""}


def test_another_studys_store_is_not_replaced(folder: Path, whole: Path) -> None:
    study = shutil.copytree(whole, folder / "small")
    write_plan(folder / "study.yaml", name="other")
    with pytest.raises(cb.CalibrantError, match="holds the study small; choose another output for other"):
        cb.run_study(
            folder / "study.yaml", output=study, cache=shutil.copytree(whole.parent / "cache", folder / "cache")
        )
    assert content(study) == content(whole)


def test_damaged_results_are_named(folder: Path, whole: Path) -> None:
    cache = Path(shutil.copytree(whole.parent / "cache", folder / "cache"))
    for file in cache.glob("originals/*/states.safetensors"):
        file.write_bytes(b"")
    write_plan(folder / "study.yaml", draws=2, recipes="rtn.yaml")
    failures = cb.run_study(folder / "study.yaml", cache=cache).failures
    assert failures
    assert all("states.safetensors: damaged" in one.error and "delete its folder" in one.error for one in failures)


def test_damaged_results_and_an_empty_store_are_made_again(folder: Path, whole: Path) -> None:
    cache = Path(shutil.copytree(whole.parent / "cache", folder / "cache"))
    for file in sorted(cache.glob("results/*.json"))[::2]:
        file.write_text("{")
    (folder / "small").mkdir()
    (folder / "small" / "study.sqlite").touch()
    assert cb.run_study(folder / "study.yaml", cache=cache).failures == []
    assert content(folder / "small") == content(whole)


def test_a_damaged_set_is_named_with_what_to_do(folder: Path, whole: Path) -> None:
    cache = Path(shutil.copytree(whole.parent / "cache", folder / "cache"))
    for file in cache.glob("sets/*/tokens.safetensors"):
        file.write_bytes(b"")
    write_plan(folder / "study.yaml", recipes=["wanda.yaml", "magnitude-2:4"])
    failures = cb.run_study(folder / "study.yaml", cache=cache).failures
    assert failures
    assert all("delete " in one.error and one.error.endswith("it is made again") for one in failures)


def test_a_model_of_nan_is_called_that(folder: Path, llama: Path) -> None:
    broken = shutil.copytree(llama, folder / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    write_plan(folder / "study.yaml", models="broken", recipes="rtn.yaml", repeat=False)
    failures = cb.run_study(folder / "study.yaml", cache=folder / "cache").failures
    assert failures
    assert all("not finite" in one.error for one in failures)


def test_the_store_has_the_plan_as_it_was_written(whole: Path) -> None:
    assert cb.Study(whole).plan.sources["text"].corpora == ("text.txt",)


def test_controls_are_zero(whole: Path) -> None:
    for finding in cb.Study(whole).analyse().settings:
        if finding.setting.measure in _TIMES:
            continue
        if finding.setting.recipe == "rtn":
            assert finding.zero_control is not None
            assert finding.zero_control.largest_difference == 0
        assert finding.implementation_noise is not None
        assert finding.implementation_noise.largest_difference == 0


def test_a_failure_stops_nothing_else(folder: Path) -> None:
    sources = {"text": {"corpus": "text.txt"}, "short": {"corpus": "short.txt"}}
    (folder / "short.txt").write_text("the red dog runs far in the sun and far in the sun again. " * 2)
    write_plan(folder / "study.yaml", sources=sources, recipes=["wanda.yaml"], draws=2)
    ran = cb.run_study(folder / "study.yaml", cache=folder / "cache")
    assert {one.cell.source for one in ran.failures} == {"short"}
    assert all("short.txt" in one.error for one in ran.failures)
    study = cb.Study(ran.folder)
    assert study.counts()["done"] == 4
    assert study.failures() == ran.failures
    (folder / "short.txt").write_text((folder / "text.txt").read_text() + "more")
    assert cb.run_study(folder / "study.yaml", cache=folder / "cache").failures == []


def test_killed_anywhere_it_ends_with_the_same_store(folder: Path, whole: Path) -> None:
    cache = folder / "cache"
    main = [sys.executable, "-c", "from calibrant.cli.main import main; main()"]
    command = ["study", "run", folder / "study.yaml", "-o", folder / "killed", "--cache", cache, "-q"]
    for results_before in (2, 8):
        process = subprocess.Popen([*main, *map(str, command)])
        while process.poll() is None and len(results(cache)) < results_before:
            time.sleep(0.01)
        process.kill()
        process.wait()
    assert cb.Study(folder / "killed").counts()["waiting"] > 0
    cb.run_study(folder / "study.yaml", output=folder / "killed", cache=cache)
    assert content(folder / "killed") == content(whole)
    assert [path for kind in ("sets", "originals", "outputs") for path in (cache / kind).glob(".*")] == []


def test_a_worker_that_dies_is_replaced(folder: Path) -> None:
    cache = folder / "cache"
    killed: list[int] = []
    killer = threading.Thread(target=_kill_a_worker, args=(cache, 5, killed))
    killer.start()
    ran = cb.run_study(folder / "study.yaml", cache=cache, workers=2)
    killer.join()
    assert killed
    assert ran.failures == []
    assert cb.Study(ran.folder).counts()["done"] == 6


def _kill_a_worker(cache: Path, results_before: int, killed: list[int]) -> None:
    while len(results(cache)) < results_before:
        time.sleep(0.01)
    pids = [child.pid for child in multiprocessing.active_children() if child.pid is not None]
    os.kill(pids[0], signal.SIGKILL)
    killed.append(pids[0])


_BAD = {
    "no such key": ({"sauces": {}}, "sauces: no such key"),
    "no such recipe": ({"recipes": "wanda-24"}, "wanda-24: no recipe of that name .* near it are wanda-2:4"),
    "no such recipe file": ({"recipes": "mine.yaml"}, "mine.yaml: no such file"),
    "a label with a space": ({"sources": {"a b": {"corpus": "text.txt"}}}, "sources.a b: use letters, digits"),
    "no such file": ({"sources": {"a": {"corpus": "nowhere.txt"}}}, "source a: .*nowhere.txt: no such text file"),
    "no such text": (
        {"texts": {"a": {"corpus": "nowhere.txt", "length": 16}}},
        "text a: .*no such text file",
    ),
    "no such strategy": (
        {"sources": {"a": {"corpus": "text.txt", "strategy": "best"}}},
        "sources.a.strategy: Input should be",
    ),
    "no such model": ({"models": "nowhere"}, "model .*nowhere: .*no such model folder"),
    "no such text to filter by": (
        {"sources": {"a": {"corpus": "text.txt", "filters": {"leakage": ["nowhere.txt"]}}}},
        "source a: filters.leakage: .*nowhere.txt: no such text file",
    ),
    "a recipe that does not fit": ({"recipes": "rtn-w4a16-g128"}, "recipe rtn-w4a16-g128 on llama.*group size"),
    "too long": ({"length": 4096}, "the rows of sets: .*context of 64"),
    "too long a text": ({"texts": {"a": {"corpus": "text.txt", "length": 4096}}}, "text a: .*context of 64"),
    "too short a text": (
        {"texts": {"a": {"corpus": "short.txt", "length": 16}}},
        "text a: .*fewer than one window of 16",
    ),
    "too few sets": (
        {"sources": {"a": {"sets": ["one"]}}, "draws": 2},
        "source a names 1 of 2 sets",
    ),
    "no set": ({"sources": {"a": {"sets": ["one", "two"]}}}, "source a: .*one"),
    "no such task": ({"tasks": {"names": ["pica"], "data": "."}}, "tasks: pica: no such task"),
    "no data of a task": ({"tasks": {"names": ["piqa"], "data": "."}}, "piqa/validation.jsonl: no such file"),
    "a source that is no mapping": ({"sources": {"a": "text.txt"}}, "sources.a: expected keys with values"),
    "a set twice": ({"sources": {"a": {"sets": ["one", "one"]}}}, "would count a set more than once"),
    "a source without its corpus": ({"sources": {"a": {"strategy": "prefix"}}}, "source a: prefix continues"),
    "a model without a chat template": (
        {"sources": {"a": {"strategy": "answers", "corpus": "text.txt", "mask": "assistant"}}},
        "source a: answers asks the model through its chat template",
    ),
    "a mask of another": ({"sources": {"a": {"strategy": "self", "mask": "assistant"}}}, "source a: `mask` is for"),
    "an empty corpus": ({"sources": {"a": {"corpus": "empty.txt"}}}, "source a: .*empty.txt"),
    "weights of other corpora": (
        {"sources": {"a": {"corpus": ["text.txt", "rtn.yaml"], "weights": [1, 2, 3]}}},
        "source a: weights name 3 of 2 corpora",
    ),
    "nothing to measure on": ({"texts": {}}, "needs texts or tasks"),
    "a text called like a task": (
        {"tasks": {"names": ["held-out"], "data": "."}},
        "a text has the name of a task",
    ),
    "twice": ({"samples": [4, 4]}, "samples names one value twice"),
    "a bad label": ({"sources": {"../a": {"corpus": "text.txt"}}}, "sources"),
    "no draws": ({"draws": 0}, "draws"),
    "a temperature that is never used": (
        {"sources": {"a": {"strategy": "self", "temperature": {"initial": 0, "final": 1}}}},
        "sources.a.temperature: initial has no effect without steps",
    ),
    "no corpus": ({"sources": {"a": {"corpus": []}}}, "sources.a.corpus: name at least one"),
    "a corpus twice": (
        {"sources": {"a": {"corpus": ["text.txt", "text.txt"]}}},
        "sources.a.corpus: names a corpus twice; its share is one of `weights`",
    ),
    "a plain value for keys": (
        {"sources": {"a": {"strategy": "self", "temperature": 1.0}}},
        "sources.a.temperature: expected keys with values",
    ),
    "acdm without targets": (
        {"sources": {"a": {"corpus": "text.txt", "strategy": "acdm"}}},
        "source a: .*acdm looks for texts like others",
    ),
    "no such target": (
        {"sources": {"a": {"corpus": "text.txt", "strategy": "acdm", "targets": ["nowhere.txt"]}}},
        "source a: .*nowhere.txt: no such text file",
    ),
    "an option of another": ({"sources": {"a": {"corpus": "text.txt", "pool": 5}}}, "source a: .*pool is for"),
}


@pytest.mark.parametrize("case", list(_BAD))
def test_a_bad_plan_is_refused_before_anything_runs(folder: Path, case: str) -> None:
    changes, said = _BAD[case]
    (folder / "empty.txt").write_text("")
    (folder / "short.txt").write_text("sun")
    write_plan(folder / "study.yaml", **changes)
    with pytest.raises(cb.CalibrantError, match=said) as found:
        cb.run_study(folder / "study.yaml", cache=folder / "cache")
    assert "\n" not in str(found.value)
    assert not (folder / "small").exists()


def test_a_saved_set_that_does_not_fit_is_refused_before_anything_runs(folder: Path) -> None:
    cb.CalibrationSet.from_tokens(torch.full((4, 16), 40_000)).save(folder / "far")
    write_plan(folder / "study.yaml", sources={"a": {"sets": ["far"]}})
    with pytest.raises(cb.CalibrantError, match=r"source a: .*far: .*outside .* vocabulary"):
        cb.run_study(folder / "study.yaml", cache=folder / "cache")


def test_a_missing_encoder_is_seen_before_anything_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    hidden = "sentence_transformers"
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == hidden else find_spec(name, *more)
    )
    source = {"corpus": "text.txt", "strategy": "herding", "embedding": "an/encoder"}
    write_plan(folder / "study.yaml", sources={"a": source})
    with pytest.raises(cb.CalibrantError, match="source a: sentence encoders need the extra"):
        cb.run_study(folder / "study.yaml", cache=folder / "cache")


def test_a_key_that_stands_twice_is_refused(folder: Path) -> None:
    (folder / "study.yaml").write_text((folder / "study.yaml").read_text() + "draws: 3\n")
    with pytest.raises(cb.CalibrantError, match="the key draws stands there twice"):
        cb.load_study_plan(folder / "study.yaml")


def test_an_empty_file_is_no_study(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(cb.CalibrantError, match=r"empty\.yaml: the study: expected keys with values"):
        cb.load_study_plan(tmp_path / "empty.yaml")


def test_a_changed_plan_is_written_as_it_is(folder: Path) -> None:
    changed = cb.load_study_plan(folder / "study.yaml").model_copy(update={"draws": 7})
    assert changed.as_written.draws == 7
    assert changed.as_written.recipes == ("rtn.yaml", "wanda.yaml")


def test_a_full_disk_is_seen_before_anything_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(cb.CalibrantError, match=r"needs about .* MB of disk, 0.0 MB are free"):
        cb.run_study(folder / "study.yaml", cache=folder / "cache")


def test_a_study_runs_once_at_a_time(folder: Path) -> None:
    (folder / "small").mkdir()
    with (folder / "small" / ".calibrant.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(cb.CalibrantError, match="another process runs this study"):
            cb.run_study(folder / "study.yaml", cache=folder / "cache")


def test_exported_tables_hold_the_scores(whole: Path, tmp_path: Path) -> None:
    study = cb.Study(whole)
    study.export(tmp_path)
    found = pyarrow.parquet.read_table(tmp_path / "scores.parquet").to_pylist()
    assert {(row["source"], row["measure"], row["value"]) for row in found if row["recipe"] != "original"} == {
        (one.source, one.measure, one.value) for one in study.scores()
    }


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_a_cluster_whose_workers_are_killed_gives_the_same_store(folder: Path, whole: Path) -> None:
    import ray

    cache = folder / "cache"
    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False, logging_level="ERROR")
    try:
        killer = threading.Thread(target=_kill_a_ray_worker, args=(cache,))
        killer.start()
        there = cb.run_study(folder / "study.yaml", output=folder / "there", cache=cache, executor="ray")
        killer.join()
    finally:
        ray.shutdown()
    assert there.failures == []
    assert content(there.folder) == content(whole)


def _kill_a_ray_worker(cache: Path) -> None:
    """Kill what computes a cell, once."""
    killed = False
    while not killed:
        for process in psutil.process_iter(["name"]):
            if (process.info["name"] or "").startswith("ray::_run_on_ray") and len(results(cache)) > 4:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
                    killed = True
                break
        time.sleep(0.2)
