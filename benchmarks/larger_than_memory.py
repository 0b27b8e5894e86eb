"""How much memory does the compression of a model take that is larger than the machine's memory?

    python benchmarks/larger_than_memory.py WORK [--blocks 2 6 32] [--limit 5.0]
    python benchmarks/larger_than_memory.py WORK --blocks 2 --samples 128 --length 512 --result many_rows

Llamas of the width of Llama-7B with random weights and so many blocks are written to WORK, block by block, and
compressed by ``gptq-w4a16`` in a process whose memory the kernel limits (a control group, which needs root; page cache
counts, and is given back when it is needed). Files of models and outputs are removed as soon as they are measured.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

import calibrant as cb

RESULTS = Path(__file__).parent / "results"
GROUPS = {
    Path("/sys/fs/cgroup/memory"): ("memory.limit_in_bytes", "memory.max_usage_in_bytes"),
    Path("/sys/fs/cgroup"): ("memory.max", "memory.peak"),
}
WIDTH, INNER, HEADS, VOCABULARY = 4096, 11008, 32, 32000


def write_model(folder: Path, blocks: int) -> int:
    """A Llama with random weights in bfloat16, a shard for each block; returns its bytes."""
    folder.mkdir(parents=True)
    config = transformers.LlamaConfig(
        hidden_size=WIDTH, intermediate_size=INNER, num_attention_heads=HEADS, num_key_value_heads=HEADS,
        num_hidden_layers=blocks, vocab_size=VOCABULARY, architectures=["LlamaForCausalLM"], dtype="bfloat16",
        pad_token_id=None,
    )  # fmt: skip
    config.save_pretrained(folder)
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{number}": number for number in range(3, VOCABULARY)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: one.shape for name, one in transformers.LlamaForCausalLM(config).named_parameters()}
    shards: dict[str, list[str]] = {}
    for name in shapes:
        shards.setdefault(name.split(".")[2] if ".layers." in name else "outside", []).append(name)
    generator = torch.Generator().manual_seed(0)
    places: dict[str, str] = {}
    for number, names in enumerate(shards.values(), 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: _random(shapes[name], generator) for name in names}
        save_file(tensors, folder / file, {"format": "pt"})
        places |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _random(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.randn(shape, generator=generator).mul_(0.02).bfloat16()


@contextmanager
def control_group(limit: int) -> Iterator[tuple[Path, str]]:
    """A control group with ``limit`` bytes of memory, and the name of its file with the peak."""
    root = next(folder for folder in GROUPS if folder.is_dir())
    most, peak = GROUPS[root]
    group = root / "calibrant-benchmark"
    group.mkdir()
    try:
        (group / most).write_text(str(limit))
        yield group, peak
    finally:
        group.rmdir()


def measure(work: Path, blocks: int, limit: int, samples: int, length: int) -> dict[str, Any]:
    """Compress a model of ``blocks`` blocks under ``limit`` bytes of memory."""
    model, output, calibration = work / "model", work / "out", work / "set"
    size = write_model(model, blocks)
    tokens = torch.randint(3, VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(0))
    cb.CalibrationSet.from_tokens(tokens).save(calibration)
    command = [
        str(Path(sys.executable).with_name("calibrant")),
        "compress",
        str(model),
        "-o",
        str(output),
        "-c",
        str(calibration),
    ]
    command += ["-r", "gptq-w4a16", "--json"]
    estimate = json.loads(subprocess.check_output([*command, "--dry-run", "--memory", str(limit)]))
    with control_group(limit) as (group, peak_file):
        begin = time.perf_counter()
        ran = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            preexec_fn=lambda: (group / "cgroup.procs").write_text(str(os.getpid())) and None,
        )
        if ran.returncode:
            raise SystemExit(f"{blocks} blocks, {limit / 1e9:g} GB: ended with {ran.returncode}. {ran.stderr[-500:]}")
        wall = time.perf_counter() - begin
        peak = int((group / peak_file).read_text())
    report = json.loads(ran.stdout)
    found = {
        "blocks": blocks,
        "model_bytes": size,
        "hidden_states": estimate["hidden_states"],
        "estimated_memory_bytes": estimate["memory_bytes"],
        "output_bytes": report["bytes_after"],
        "tensors_verified": report["tensors_verified"],
        "wall_seconds": round(wall, 1),
        "stages": report["seconds"],
        "resident_peak_bytes": report["peak_memory_bytes"],
        "group_peak_bytes": peak,
    }
    shutil.rmtree(work)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder to write models and outputs to, which must not exist")
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 6, 32])
    parser.add_argument("--limit", type=float, default=5.0, help="GB of memory")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--result", default="larger_than_memory", help="name of the file in results/")
    given = parser.parse_args()
    table = Table("blocks", "model GB", "output GB", "seconds", "peak resident GB")
    runs = []
    for blocks in given.blocks:
        run = measure(given.work, blocks, int(given.limit * 1e9), given.samples, given.length)
        runs.append(run)
        numbers = (run["model_bytes"] / 1e9, run["output_bytes"] / 1e9, run["wall_seconds"])
        table.add_row(str(blocks), *(f"{one:.2f}" for one in numbers), f"{run['resident_peak_bytes'] / 1e9:.2f}")
        Console().print(run)
    Console().print(table)
    settings = {"limit_bytes": int(given.limit * 1e9), "samples": given.samples, "length": given.length}
    versions = {"calibrant": cb.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    machine = {
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "capabilities": torch.backends.cpu.get_cpu_capability(),
    }
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine,
        "versions": versions,
        "settings": settings,
        "runs": runs,
    }
    (RESULTS / f"{given.result}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
