"""Tasks on the command line."""

import json
from pathlib import Path

from tests.evaluation.task_rows import write_rows


def test_evaluate_shows_tasks_beside_the_original(run, llama: Path, model_folder, tmp_path: Path) -> None:
    command = ["evaluate", llama, "--against", model_folder("mistral"), "--tasks", "copa, rte", "--text", "none"]
    command += ["--data", write_rows(tmp_path), "--limit", 3]
    status, shown, _ = run(*command)
    assert status == 0
    assert all(word in shown for word in ("copa", "rte", "McNemar"))
    status, shown, _ = run(*command, "--task-limit", 2, "--json")
    found = json.loads(shown)
    assert [(task["name"], len(task["scores"])) for task in found["tasks"]] == [("copa", 2), ("rte", 2)]
    assert [one["items"] for one in found["task_comparisons"]] == [2, 2]
    assert found["perplexity"] is None


def test_bad_tasks_are_refused_with_one_sentence(run, llama: Path, tmp_path: Path) -> None:
    for options, said in (
        (["--tasks", "piqua"], "piqua: no such task; there are arc_challenge"),
        (["--tasks", "piqa"], "name the folder of the tasks' files with --data, or load them with --data hub:"),
        (["--tasks", "piqa", "--data", tmp_path], "the task piqa reads its items from it"),
        (["--text", "none"], "give --text, --wikitext or --tasks"),
        (["--text", "none", "--wikitext", tmp_path / "none.raw"], "--wikitext is WikiText's raw file"),
    ):
        status, shown, error = run("evaluate", llama, *options)
        assert (status, shown) == (2, "")
        assert said in error
        assert len(error.strip().splitlines()) == 1
