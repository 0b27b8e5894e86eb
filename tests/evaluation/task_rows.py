"""A few rows of each task: as a data folder has them, and as the hub's data set does."""

import json
from pathlib import Path
from typing import Any

import lm_eval.tasks

_ARC = [
    {
        "id": f"Q{n}",
        "question": f"Which of these is number {n}?",
        "choices": {"text": ["one", "two", "not a number", "four"], "label": ["A", "B", "C", "D"]},
        "answerKey": "ABCD"[n % 4],
    }
    for n in range(5)
]
_GSM8K = [
    {"question": f"Ann has {n} apples and buys {n}. How many?", "answer": f"{n}+{n}={2 * n}\n#### {2 * n}"}
    for n in range(9)
]
SUBJECTS = tuple(
    sorted(
        path.stem.removeprefix("mmlu_")
        for path in (Path(lm_eval.tasks.__file__).parent / "mmlu" / "default").glob("mmlu_*.yaml")
    )
)
_MMLU = [
    {"question": f" What is {n} in {subject}? ", "subject": subject, "choices": ["a", "bc", "d", "ef"], "answer": n % 4}
    for n in range(3)
    for subject in SUBJECTS
]
_PASSAGES = [f"Cats number {n} sleep. They dream of" for n in range(4)]

# Path below the data folder, rows there, name of the split on the hub, rows there.
FILES: dict[str, list[tuple[str, list[dict[str, Any]], str, list[dict[str, Any]]]]] = {
    "arc_easy": [("arc_easy/test", _ARC, "test", _ARC)],
    "arc_challenge": [("arc_challenge/test", _ARC, "test", _ARC)],
    "boolq": [
        (
            "boolq/validation",
            [{"question": f"is it {n}", "answer": n % 2 == 0, "passage": f"It is {n}."} for n in range(4)],
            "validation",
            [{"question": f"is it {n}", "passage": f"It is {n}.", "idx": n, "label": 1 - n % 2} for n in range(4)],
        )
    ],
    "hellaswag": [
        (
            "hellaswag/validation",
            rows := [
                {
                    "ind": n,
                    "activity_label": "Cooking [title] soup",
                    "ctx_a": f"A cook has {n} pots.",
                    "ctx_b": "the cook",
                    "ctx": f"A cook has {n} pots. the cook",
                    "endings": ["stirs  one.", "flies [step] away.", "sleeps.", "is a pot."],
                    "source_id": f"s~{n}",
                    "split": "val",
                    "split_type": "indomain",
                    "label": str(n % 4),
                }
                for n in range(4)
            ],
            "validation",
            rows,
        )
    ],
    "lambada_openai": [
        (
            "lambada/lambada_openai_test",
            [{"context": passage, "continuation": "mice"} for passage in _PASSAGES],
            "test",
            [{"text": f"{passage} mice"} for passage in _PASSAGES],
        )
    ],
    "openbookqa": [
        (
            "openbookqa/test",
            rows := [
                {"id": row["id"], "question_stem": row["question"], **{k: row[k] for k in ("choices", "answerKey")}}
                for row in _ARC
            ],
            "test",
            rows,
        )
    ],
    "piqa": [
        (
            "piqa/validation",
            rows := [
                {"goal": f"Open {n} jars", "sol1": "Turn the lid.", "sol2": "Sing.", "label": n % 2} for n in range(4)
            ],
            "validation",
            rows,
        )
    ],
    "rte": [
        (
            "rte/validation",
            rows := [
                {"sentence1": f"There are {n} dogs.", "sentence2": "Dogs exist.", "label": n % 2, "idx": n}
                for n in range(4)
            ],
            "validation",
            rows,
        )
    ],
    "winogrande": [
        (
            "winogrande/validation",
            rows := [
                {
                    "sentence": f"Ann gave Bea {n} pens as _ was kind.",
                    "option1": "Ann",
                    "option2": "Bea",
                    "answer": "12"[n % 2],
                }
                for n in range(4)
            ],
            "validation",
            rows,
        )
    ],
    "copa": [
        (
            "copa/validation",
            rows := [
                {
                    "premise": f"It rained for {n} days.",
                    "choice1": "The river rose.",
                    "choice2": "The clouds came.",
                    "question": ("effect", "cause")[n % 2],
                    "idx": n,
                    "label": n % 2,
                }
                for n in range(4)
            ],
            "validation",
            rows,
        )
    ],
    "gsm8k": [
        ("gsm8k/train", _GSM8K[:7], "train", _GSM8K[:7]),
        ("gsm8k/test", _GSM8K[7:], "test", _GSM8K[7:]),
    ],
    "mmlu": [("mmlu/dev", _MMLU, "dev", _MMLU), ("mmlu/test", _MMLU, "test", _MMLU)],
}


def write_rows(folder: Path) -> Path:
    """A data folder with the rows of all tasks."""
    for files in FILES.values():
        for stem, rows, _, _ in files:
            path = folder / f"{stem}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
