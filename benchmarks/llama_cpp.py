"""llama.cpp's quantizer with importance matrices from our calibration sets, and without.

    python benchmarks/llama_cpp.py MODEL --gguf model-f16.gguf --bin llama.cpp/build/bin --corpus c4.utf8.gz \
        --text wiki.test.raw.gz

``--gguf`` is MODEL as llama.cpp's own converter writes it, ``--bin`` the folder of ``llama-quantize`` and
``llama-perplexity``. Everything is measured by llama.cpp: the divergence is that of the quantized file from ``--gguf``.
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


def run(*command: object) -> str:
    """A command's output and messages."""
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=True)
    return done.stdout.decode(errors="replace")


def measure(options: argparse.Namespace, folder: Path, kind: str, matrix: Path | None) -> dict[str, float]:
    """Quantize to ``kind`` and compare with the original."""
    output = folder / "quantized.gguf"
    weighting = ["--imatrix", matrix] if matrix is not None else []
    said = run(options.bin / "llama-quantize", *weighting, options.gguf, output, kind, 2)
    # Embeddings are in nobody's matrix.
    missed = re.findall(r"did not find weights for (blk\.\S+)", said) if matrix is not None else []
    if missed:
        raise SystemExit(f"llama-quantize found no weights for {missed[0]} in {matrix}")
    compared = run(
        *(options.bin / "llama-perplexity", "-m", output, "-t", 2, "-c", 512),
        *("--kl-divergence-base", folder / "base.kld", "--kl-divergence"),
    )
    found = {name: re.search(pattern, compared) for name, pattern in MEASURES.items()}
    return {name: float(one[1]) for name, one in found.items() if one is not None} | {
        "bytes": float(output.stat().st_size)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--bin", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--types", nargs="+", default=["Q4_0", "IQ4_NL", "Q3_K_S", "Q2_K"])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--chunks", type=int, default=16, help="evaluation windows of 512 tokens")
    options = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = folder / "text.txt"
        raw = options.text.read_bytes()
        text.write_bytes(gzip.decompress(raw) if options.text.suffix == ".gz" else raw)
        arguments = ("-f", text, "-t", 2, "-c", 512, "--chunks", options.chunks)
        run(
            options.bin / "llama-perplexity",
            *("-m", options.gguf, *arguments, "--kl-divergence-base", folder / "base.kld"),
        )
        sets = {
            "uniform": cb.select(options.corpus, tokenizer=options.model, samples=options.samples, length=512),
            "zipcal": cb.select(
                options.corpus, tokenizer=options.model, strategy="zipcal", samples=options.samples, length=512
            ),
            "self": cb.generate(options.model, samples=options.samples, length=512),
        }
        matrices: dict[str, Path | None] = {"none": None}
        for label, made in sets.items():
            matrices[label] = folder / f"{label}.gguf"
            cb.write_importance_matrix(options.model, calibration=made, output=folder / f"{label}.gguf")
        for kind in options.types:
            for label, matrix in matrices.items():
                found[f"{kind}: {label}"] = measure(options, folder, kind, matrix)
                print(f"{kind}: {label}: {found[f'{kind}: {label}']}", flush=True)
    table = Table("type", "matrix", "KL", "MB")
    for label, one in found.items():
        error = f"{one['kl_mean']:.4f} ± {one['kl_standard_error']:.4f}"
        table.add_row(*label.split(": "), error, f"{one['bytes'] / 1e6:.0f}")
    Console(width=100).print(table)
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "system": platform.platform(),
        "llama.cpp": run(options.bin / "llama-perplexity", "--version").strip().splitlines()[0],
        "settings": {"model": options.model.resolve().name, "samples": options.samples, "chunks": options.chunks},
        "runs": found,
    }
    (HERE / "results" / "llama_cpp.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
