"""ZipCal out of JSON Lines of growing size, under a memory limit that the operating system enforces.

python benchmarks/selection_scale.py MODEL --text c4.utf8.gz wiki.utf8.gz

Documents are made as in selection.py. The limit is on what the process allocates (RLIMIT_DATA).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from selection import words_of, write_documents

MEMORY_LIMIT = 1_500_000_000
LIMITED = """
import json, resource, sys, time
limit = int(sys.argv[4])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
begin = time.perf_counter()
import calibrant as cb
made = cb.select(sys.argv[1], tokenizer=sys.argv[2], strategy="zipcal", samples=128, length=512)
made.save(sys.argv[3])
seconds = time.perf_counter() - begin
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
peak = int(status["VmHWM"].split()[0]) * 1024
print(json.dumps({"seconds": seconds, "peak_resident_bytes": peak, "candidates": made.manifest.counts["candidates"]}))
"""


def under_the_limit(path: Path, model: Path) -> dict[str, float]:
    """One selection in a process that may not allocate more than ``MEMORY_LIMIT``."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", LIMITED, str(path), str(model), folder, str(MEMORY_LIMIT)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {"bytes": path.stat().st_size, **json.loads(done.stdout)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[0.1, 0.3, 1.0])
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "selection_scale.json")
    options = parser.parse_args()
    words, runs = words_of(options.text), []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "large.jsonl"
        for size in options.gigabytes:
            write_documents(path, words, size=int(size * 1e9))
            runs.append(under_the_limit(path, options.model))
            print(runs[-1], flush=True)
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "cores": os.cpu_count(),
        "model": options.model.name,
        "memory_limit_bytes": MEMORY_LIMIT,
        "runs": runs,
    }
    options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
