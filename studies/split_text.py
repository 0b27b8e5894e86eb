"""Cut a text in two: a beginning to measure on, and a rest in documents that a seed can draw among.

    python studies/split_text.py input.txt.gz --name shakespeare -o texts

Writes NAME.test.txt (the first 100,000 bytes) and NAME.tuning.jsonl (lines joined to at least 1,000 characters).
"""

import argparse
import json
from pathlib import Path

from small_models.data import read_text

TEST_BYTES, DOCUMENT_CHARACTERS = 100_000, 1000


def documents(text: str) -> list[str]:
    """Lines joined until they are long enough; the last may be shorter."""
    found, current = [], ""
    for line in text.splitlines(keepends=True):
        current += line
        if len(current) >= DOCUMENT_CHARACTERS:
            found.append(current)
            current = ""
    return [*found, current] if current else found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    content = read_text(options.text).encode("utf-8")
    # A character that the cut divides is left out.
    test, rest = (part.decode("utf-8", "ignore") for part in (content[:TEST_BYTES], content[TEST_BYTES:]))
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"{options.name}.test.txt").write_text(test, encoding="utf-8")
    lines = [json.dumps({"text": one}) + "\n" for one in documents(rest)]
    (options.output / f"{options.name}.tuning.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
