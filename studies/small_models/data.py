"""Texts and questions as the small models read them."""

import gzip
import json
from pathlib import Path
from typing import Any

import torch

# Tokens of a question; longer ones are cut.
LENGTH = 96


def read_text(path: Path) -> str:
    """What a text file says, gzip or not."""
    content = path.read_bytes()
    return (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8")


def read_records(path: Path) -> list[dict[str, Any]]:
    """JSON Lines."""
    return [json.loads(line) for line in read_text(path).split("\n") if line]


def read_questions(path: Path, tokenizer: Any, subjects: list[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """MMLU's questions with their choices, and which of ``subjects`` each is of.

    Returns:
        Token ids and their mask ``[questions, LENGTH]``, labels ``[questions]``.
    """
    records = read_records(path)
    unknown = {record["subject"] for record in records} - set(subjects)
    if unknown:
        raise SystemExit(f"{path}: has subjects that the model does not know: {', '.join(sorted(unknown))}")
    texts = ["\n".join([record["question"].strip(), *map(str, record["choices"])]) for record in records]
    made = tokenizer(texts, truncation=True, max_length=LENGTH, padding="max_length", return_tensors="pt")
    labels = torch.tensor([subjects.index(record["subject"]) for record in records])
    return made["input_ids"], made["attention_mask"], labels
