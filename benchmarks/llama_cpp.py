"""Our GGUF files beside llama.cpp's quantizer, with importance matrices from our calibration sets and without.

    python benchmarks/llama_cpp.py MODEL --bin llama.cpp/build/bin --corpus c4.utf8.gz --text wiki.test.raw.gz

``--bin`` is the folder of ``llama-quantize`` and ``llama-perplexity``. Everything is measured by llama.cpp: divergence
is that of a file from the original in float32 (``write_gguf``). All files of a type have embeddings in Q8_0 and every
linear in that type (``--pure``), or in the type that llama.cpp falls back to, so they are equally large. Ours is GPTQ
on the set ``uniform``, with scales fitted on the same Hessian's diagonal that is the importance matrix.
"""

import argparse
import gzip
import json
import platform
import re
import subprocess
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

import calibrant as cb

HERE = Path(__file__).parent
MEASURES = {"kl_mean": r"Mean\s+KLD:\s+(\S+)", "kl_standard_error": r"Mean\s+KLD:\s+\S+\s+±\s+(\S+)"}
TYPES = ["Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "Q3_K", "Q2_K"]
# As llama-quantize calls them; with --pure the size does not matter.
CALLED = {"Q5_K": "Q5_K_S", "Q4_K": "Q4_K_S", "Q3_K": "Q3_K_S"}
OURS = "ours"


def run(*command: object) -> str:
    """A command's output and messages."""
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=True)
    return done.stdout.decode(errors="replace")


def quantize(options: argparse.Namespace, folder: Path, kind: str, matrix: Path | None) -> Path:
    """By llama.cpp."""
    output = folder / "quantized.gguf"
    weighting = ["--imatrix", matrix] if matrix is not None else []
    same = ["--pure", "--token-embedding-type", "q8_0", "--output-tensor-type", "q8_0"]
    original = folder / "original.gguf"
    said = run(options.bin / "llama-quantize", *weighting, *same, original, output, CALLED.get(kind, kind), 2)
    # Embeddings are in nobody's matrix.
    missed = re.findall(r"did not find weights for (blk\.\S+)", said) if matrix is not None else []
    if missed:
        raise SystemExit(f"llama-quantize found no weights for {missed[0]} in {matrix}")
    return output


def ours(options: argparse.Namespace, folder: Path, kind: str, made: cb.CalibrationSet) -> Path:
    """By ``compress`` and ``write_gguf``."""
    output = folder / "ours.gguf"
    cb.compress(options.model, recipe=f"gptq-{kind.lower()}", calibration=made, output=folder / "ours", overwrite=True)
    cb.write_gguf(folder / "ours", output=output, overwrite=True)
    return output


def measure(options: argparse.Namespace, folder: Path, file: Path) -> dict[str, float]:
    compared = run(
        *(options.bin / "llama-perplexity", "-m", file, "-t", 2, "-c", 512),
        *("--kl-divergence-base", folder / "base.kld", "--kl-divergence"),
    )
    found = {name: re.search(pattern, compared) for name, pattern in MEASURES.items()}
    return {name: float(one[1]) for name, one in found.items() if one is not None} | {
        "bytes": float(file.stat().st_size)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--bin", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--types", nargs="+", default=TYPES)
    parser.add_argument("--matrices", nargs="+", default=["uniform"], help="of uniform, zipcal and self")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--chunks", type=int, default=16, help="evaluation windows of 512 tokens")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "llama_cpp.json")
    options = parser.parse_args()
    settings = {
        "model": options.model.resolve().name,
        "corpus": options.corpus.name,
        "text": options.text.name,
        "samples": options.samples,
        "chunks": options.chunks,
    }
    known = json.loads(options.json.read_text()) if options.json.exists() else {}
    found: dict[str, dict[str, float]] = known["runs"] if known.get("settings") == settings else {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = folder / "text.txt"
        raw = options.text.read_bytes()
        text.write_bytes(gzip.decompress(raw) if options.text.suffix == ".gz" else raw)
        cb.write_gguf(options.model, output=folder / "original.gguf", embeddings="stored")
        run(
            *(options.bin / "llama-perplexity", "-m", folder / "original.gguf", "-f", text, "-t", 2, "-c", 512),
            *("--chunks", options.chunks, "--kl-divergence-base", folder / "base.kld"),
        )
        uniform = cb.select(options.corpus, tokenizer=options.model, samples=options.samples, length=512)
        matrices: dict[str, Path | None] = {"none": None}
        for label in options.matrices:
            made = uniform
            if label == "self":
                made = cb.generate(options.model, samples=options.samples, length=512)
            elif label != "uniform":
                made = cb.select(
                    options.corpus, tokenizer=options.model, strategy=label, samples=options.samples, length=512
                )
            matrices[label] = folder / f"{label}.gguf"
            cb.write_importance_matrix(options.model, calibration=made, output=folder / f"{label}.gguf")
        for kind in [kind for kind in options.types if f"{kind}: {OURS}" not in found]:
            for label, matrix in matrices.items():
                found[f"{kind}: {label}"] = measure(options, folder, quantize(options, folder, kind, matrix))
            found[f"{kind}: {OURS}"] = measure(options, folder, ours(options, folder, kind, uniform))
            for label in (*matrices, OURS):
                print(f"{kind}: {label}: {found[f'{kind}: {label}']}", flush=True)
            keep(options, settings, found)
    table = Table("type", "by", "KL", "of llama.cpp's with matrix", "MB")
    for label, one in found.items():
        kind, by = label.split(": ")
        error = f"{one['kl_mean']:.4f} ± {one['kl_standard_error']:.4f}"
        ratio = one["kl_mean"] / found[f"{kind}: {options.matrices[0]}"]["kl_mean"]
        table.add_row(kind, by, error, f"{ratio:.2f}", f"{one['bytes'] / 1e6:.1f}")
    Console(width=100).print(table)


def keep(options: argparse.Namespace, settings: dict[str, object], runs: dict[str, dict[str, float]]) -> None:
    """Write what is known so far; a stopped benchmark continues from there."""
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "system": platform.platform(),
        "llama.cpp": run(options.bin / "llama-perplexity", "--version").strip().splitlines()[0],
        "settings": settings,
        "runs": runs,
    }
    options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
