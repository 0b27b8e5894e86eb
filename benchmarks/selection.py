"""Selections: ZipCal beside the pooled loop of its paper's code, beside tokenization alone, and beside COLA.

python benchmarks/selection.py MODEL --text c4.utf8.gz wiki.utf8.gz

Documents are runs of the given text with one word in twenty replaced by another of its words.
"""

import argparse
import gzip
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers
from rich.console import Console

import calibrant as cb
from calibrant.calibration.corpus import Corpus
from calibrant.calibration.selection.coverage import SetFamily, greedy_cover, pooled_cover
from calibrant.calibration.selection.zipcal import ZipCal
from calibrant.calibration.windows import Window
from calibrant.modeling.tokenizer import Tokenizer

PICKS, LENGTH, POOL = 128, 512, 2000


def words_of(files: list[Path]) -> list[str]:
    """The words of the base text, in order."""
    return [word for file in files for document in Corpus(file) for word in document.text.split()]


def documents(words: list[str], seed: int) -> Iterator[str]:
    """Endless documents of 50 to 600 words."""
    rng = np.random.default_rng(seed)
    pool = np.array(words, dtype=object)
    while True:
        size = int(rng.integers(50, 600))
        begin = int(rng.integers(0, len(words) - size))
        chosen = pool[begin : begin + size].copy()
        changed = rng.random(size) < 0.05
        chosen[changed] = pool[rng.integers(0, len(pool), int(changed.sum()))]
        yield " ".join(chosen)


def write_documents(path: Path, words: list[str], count: int | None = None, size: int | None = None) -> int:
    """JSON Lines (gzip for .gz) of ``count`` documents or about ``size`` bytes; returns the number of documents."""
    written = number = 0
    with gzip.open(path, "wt", compresslevel=4) if path.suffix == ".gz" else path.open("w") as out:
        for text in documents(words, seed=0):
            written += out.write(json.dumps({"text": text}) + "\n")
            number += 1
            if number == count or (size is not None and written >= size):
                return number
    raise AssertionError


def best(work: Callable[[], object], repeats: int = 3) -> tuple[float, object]:
    """Least seconds of several runs, and the last result."""
    seconds, result = [], None
    for _ in range(repeats):
        begin = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - begin)
    return min(seconds), result


def reference_sets(rows: list[list[int]], tokenizer: Tokenizer) -> list[set[str]]:
    """The normalised sub-words of every document; the norm of an id is computed once (kinder than the original)."""
    special, norms = tokenizer.special_ids, {}
    for index in {token for row in rows for token in row} - special:
        norms[index] = tokenizer.hf.decode([index]).lower().replace(" ", "").replace("Ġ", "").strip()
    return [{norms[token] for token in row if norms.get(token)} for row in rows]


def reference_pooled(sets: list[set[str]], count: int, pool: int, seed: int) -> tuple[list[int], int]:
    """Pooled greedy coverage, as the released code of arXiv 2603.16105 does it."""
    rng = np.random.RandomState(seed)
    remaining, covered, chosen = set(range(len(sets))), set(), []
    while len(chosen) < count and remaining:
        looked = rng.choice(list(remaining), pool, replace=False) if len(remaining) > pool else remaining
        best_index, best_key = -1, (-1, -1)
        for index in looked:
            key = (len(sets[index] - covered), len(sets[index]))
            if key > best_key:
                best_index, best_key = int(index), key
        chosen.append(best_index)
        covered |= sets[best_index]
        remaining.remove(best_index)
    return chosen, len(covered)


def selection_speed(texts: list[str], tokenizer: Tokenizer) -> dict[str, float]:
    """Seconds from token ids to picks: making the sets, and the greedy loop over them."""
    rows = [row[:LENGTH] for row in tokenizer.encode_batch(texts)]
    windows = [Window(row, [], 0, 0, 0) for row in rows]

    def selector() -> ZipCal:
        chosen = ZipCal(tokenizer, None, np.random.default_rng(0))
        for begin in range(0, len(windows), 64):
            chosen.see(windows[begin : begin + 64])
        return chosen

    selector().choose(2)  # compile
    sets_seconds, seen = best(selector)
    assert isinstance(seen, ZipCal)
    family: SetFamily = seen._family
    loop_seconds, picks = best(lambda: greedy_cover(family, PICKS))
    pooled_seconds, pooled = best(lambda: pooled_cover(family, PICKS, POOL, np.random.default_rng(0)))
    begin = time.perf_counter()
    sets = reference_sets(rows, tokenizer)
    reference_sets_seconds = time.perf_counter() - begin
    begin = time.perf_counter()
    _, covered = reference_pooled(sets, PICKS, POOL, 0)
    reference_loop_seconds = time.perf_counter() - begin
    return {
        "documents": len(rows),
        "sets_seconds": sets_seconds,
        "loop_seconds": loop_seconds,
        "pooled_seconds": pooled_seconds,
        "reference_sets_seconds": reference_sets_seconds,
        "reference_loop_seconds": reference_loop_seconds,
        "loop_ratio": reference_loop_seconds / loop_seconds,
        "whole_ratio": (reference_sets_seconds + reference_loop_seconds) / (sets_seconds + loop_seconds),
        "covered": int(picks.covered[-1]),
        "covered_pooled": int(pooled.covered[-1]),
        "covered_reference": covered,
    }


def end_to_end(path: Path, model: Path) -> dict[str, float]:
    """Compressed JSON Lines to a saved set, beside reading and tokenizing the same file and nothing else."""

    def tokenize() -> None:
        tokenizer = Tokenizer(model)  # a new one: tokenizers remember the words they have seen
        batch: list[str] = []
        for document in Corpus(path):
            batch.append(document.text)
            if len(batch) == 512:
                tokenizer.encode_batch(batch)
                batch = []
        tokenizer.encode_batch(batch)

    def whole() -> None:
        with tempfile.TemporaryDirectory() as folder:
            made = cb.select(path, tokenizer=model, strategy="zipcal", samples=PICKS, length=LENGTH)
            made.save(folder)

    pairs = [(best(tokenize, 1)[0], best(whole, 1)[0]) for _ in range(2)]
    alone, ours = min(pair[0] for pair in pairs), min(pair[1] for pair in pairs)
    return {"tokenization_seconds": alone, "seconds": ours, "ratio": ours / alone}


def beside_cola(path: Path, model: Path, samples: int) -> dict[str, float]:
    """The same documents through COLA's third stage, one forward pass each."""
    common = {"tokenizer": model, "samples": samples, "length": LENGTH, "windows": "document"}
    zipcal, _ = best(lambda: cb.select(path, strategy="zipcal", **common))
    cola, _ = best(lambda: cb.select(path, strategy="cola", **common), 1)
    return {
        "documents": sum(1 for _ in Corpus(path)),
        "zipcal_seconds": zipcal,
        "cola_seconds": cola,
        "ratio": cola / zipcal,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--documents", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--cola-documents", type=int, default=256)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "selection.json")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    words, tokenizer = words_of(options.text), Tokenizer(options.model)
    console = Console(width=140)
    found: dict[str, object] = {}

    def note(name: str, row: dict[str, float]) -> None:
        found[name] = row
        console.print(name, {key: round(value, 4) for key, value in row.items()})

    stream = documents(words, seed=1)
    texts = [next(stream) for _ in range(max(options.documents))]
    for count in options.documents:
        note(f"selection of {count}", selection_speed(texts[:count], tokenizer))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "documents.jsonl.gz"
        write_documents(path, words, count=max(options.documents))
        note("end to end", end_to_end(path, options.model))
        write_documents(path, words, count=options.cola_documents)
        note("beside COLA", beside_cola(path, options.model, PICKS))
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "cores": os.cpu_count(),
        "versions": {"torch": torch.__version__, "tokenizers": tokenizers.__version__, "numpy": np.__version__},
        "model": options.model.name,
        "picks": PICKS,
        "length": LENGTH,
        **found,
    }
    options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
