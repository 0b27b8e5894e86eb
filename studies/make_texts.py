"""Makes the corpora of the studies, one JSON line a document, from a folder of texts.

    python studies/make_texts.py DATA            # writes studies/texts

DATA holds `exllama_cal/{c4,wiki,code,technical}.utf8.gz` (turboderp-org/exllamav3, conversion/standard_cal_data),
`tinyshakespeare/input.txt.gz` (karpathy/char-rnn) and `wikitext2/wiki.test.raw.gz` (WikiText-2's raw test file). C4 has
a document a line, Wikipedia marks its articles; code, technical text and plays are cut at empty lines into pieces of at
least 4,000 characters. The last seventh of C4 is held out, for measuring. The folders of the tasks are copied.
"""

import argparse
import gzip
import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

_PIECE = 4000
_ARTICLE = re.compile(r"<doc [^>]*>\n(.*?)</doc>", re.DOTALL)
_TEXTS = Path(__file__).parent / "texts"
_TASKS = ("arc_easy", "copa", "piqa", "winogrande")


def pieces(text: str) -> Iterable[str]:
    """Whole paragraphs, joined until they have ``_PIECE`` characters."""
    held: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        held.append(paragraph)
        if sum(map(len, held)) >= _PIECE:
            yield "\n\n".join(held)
            held = []
    if held:
        yield "\n\n".join(held)


def write(name: str, texts: Iterable[str]) -> None:
    """One JSON line for every text that is not empty."""
    kept = [text.strip() for text in texts if text.strip()]
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in kept)
    (_TEXTS / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    print(f"{name}: {len(kept)} documents")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    data = parser.parse_args().data

    def read(name: str) -> str:
        return gzip.decompress((data / name).read_bytes()).decode("utf-8")

    _TEXTS.mkdir(exist_ok=True)
    web = read("exllama_cal/c4.utf8.gz").splitlines()
    cut = len(web) * 6 // 7
    write("c4", web[:cut])
    write("c4-held-out", web[cut:])
    write("wiki", _ARTICLE.findall(read("exllama_cal/wiki.utf8.gz")))
    write("code", pieces(read("exllama_cal/code.utf8.gz")))
    write("technical", pieces(read("exllama_cal/technical.utf8.gz")))
    write("plays", pieces(read("tinyshakespeare/input.txt.gz")))
    shutil.copyfile(data / "wikitext2" / "wiki.test.raw.gz", _TEXTS / "wiki.test.raw.gz")
    for task in _TASKS:
        shutil.copytree(data / task, _TEXTS / "tasks" / task, dirs_exist_ok=True)


if __name__ == "__main__":
    main()
