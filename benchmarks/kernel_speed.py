"""Times kernels and the code they replace: ratios of the best of several runs, in one session.

    python benchmarks/kernel_speed.py [--json FILE]

Attention is for processors with AVX512-BF16 alone.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from calibrant.kernels.bfloat16_tile import available
from calibrant.kernels.causal_attention import causal_attention
from calibrant.kernels.column_loop import solve_columns
from calibrant.kernels.gram import add_gram
from calibrant.kernels.group_moments import WeightedGroups
from calibrant.kernels.inverse_factor import inverse_factor
from calibrant.kernels.lookup import every_number, look_up
from calibrant.kernels.number_types import NumberType
from calibrant.kernels.outlier_columns import OutlierColumns, RangeGrid, leave_one_out_gains
from calibrant.kernels.rms_norm import rms_norm
from calibrant.methods.solvers.gptq import quantization_problem
from calibrant.methods.solvers.second_order import prepare
from calibrant.quantization.grid_fitting import fit_grid
from calibrant.quantization.grids import GridSpec

REPEATS = 9


def best(work: Callable[[], object]) -> float:
    """Least seconds of several runs, after a warm-up run."""
    work()
    seconds = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def gram(width: int, dtype: torch.dtype) -> tuple[float, float]:
    """Symmetric accumulation versus a full float32 product."""
    inputs, sums = torch.randn(2048, width).to(dtype), torch.zeros(width, width)
    return best(lambda: add_gram(sums, inputs)), best(lambda: sums.addmm_(inputs.float().T, inputs.float()))


def attention(length: int) -> tuple[float, float]:
    """Blocked attention versus PyTorch's fused attention: 9 query heads, 3 key-value heads, width 64."""
    query = torch.randn(4, length, 9, 64).bfloat16().transpose(1, 2)
    key, value = (torch.randn(4, length, 3, 64).bfloat16().transpose(1, 2) for _ in range(2))
    fused = torch.nn.functional.scaled_dot_product_attention
    return (
        best(lambda: causal_attention(query, key, value, 0.125)),
        best(lambda: fused(query, key, value, is_causal=True, enable_gqa=True)),
    )


def norm(width: int) -> tuple[float, float]:
    """One pass over memory versus the operations of transformers' modules, 2,048 rows."""
    weight, inputs = torch.randn(width).bfloat16(), torch.randn(2048, width).bfloat16()

    def operations() -> torch.Tensor:
        wide = inputs.to(torch.float32)
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(torch.bfloat16)

    return best(lambda: rms_norm(inputs, weight.float(), 1e-5, True)), best(operations)


def activation(module: nn.Module, width: int) -> tuple[float, float]:
    """A function's table versus the function, 2,048 rows."""
    inputs, table = torch.randn(2048, width).bfloat16(), module(every_number())
    return best(lambda: look_up(inputs, table)), best(lambda: module(inputs))


def columns(rows: int, width: int) -> tuple[float, float]:
    """The compiled column loop versus its PyTorch twin."""
    weight, inputs = torch.randn(rows, width), torch.randn(2 * width, width)
    grid = fit_grid(weight, GridSpec(4, True, 64, torch.float32))
    problem = quantization_problem(weight, prepare(inputs.T @ inputs, 0.01, act_order=False), grid)
    return best(lambda: solve_columns(problem)), best(lambda: solve_columns(problem, compiled=False))


def outlier_columns(rows: int, width: int) -> tuple[float, float]:
    """SpQR's kernels versus their PyTorch twins, groups of 16."""
    weight, inputs = torch.randn(rows, width), torch.randn(2 * width, width)
    factor, _ = inverse_factor(inputs.T @ inputs, 1.0)
    threshold = 0.2 * (weight.var(0) / factor.diagonal().square()).mean().expand(rows, 1)
    plain = RangeGrid(4, False)

    def solve(compiled: bool) -> None:
        solving = OutlierColumns(weight, factor, threshold, 4, compiled)
        for begin in range(0, width, 16):
            group = solving.columns(begin, begin + 16)
            leave_one_out_gains(group, factor.diagonal()[begin : begin + 16], plain, compiled)
            solving.solve(begin, begin + 16, *plain.fit(group))

    return best(lambda: solve(True)), best(lambda: solve(False))


def moments(width: int) -> tuple[float, float]:
    """Moments of four-bit codes of a million weights in groups of ``width`` versus their PyTorch twin."""
    groups, importance = torch.randn(1024, 1024 // width, width), torch.rand(1024, 1024 // width, width)
    scale, none = groups.abs().amax(-1) / 7, torch.zeros(1024, 1024 // width)
    numbers = NumberType.integers(4)
    kernel, twin = (WeightedGroups(groups, importance, numbers, compiled) for compiled in (True, False))
    return best(lambda: kernel.moments(scale, none)), best(lambda: twin.moments(scale, none))


def factor(width: int) -> tuple[float, float]:
    """One factorization versus the three steps of the papers' released code."""
    inputs = torch.randn(2 * width, width)
    hessian = inputs.T @ inputs + torch.eye(width)

    def three_steps() -> torch.Tensor:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
        return torch.linalg.cholesky(inverse, upper=True)

    return best(lambda: inverse_factor(hessian, 0.01)), best(three_steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "kernels.json")
    options = parser.parse_args()
    with torch.inference_mode():
        found = {
            "gram bfloat16 576": gram(576, torch.bfloat16),
            "gram bfloat16 1536": gram(1536, torch.bfloat16),
            "gram float32 1536": gram(1536, torch.float32),
            **({"attention 512": attention(512), "attention 2048": attention(2048)} if available() else {}),
            "norm 576": norm(576),
            "gelu 2048": activation(nn.GELU("tanh"), 2048),
            "silu 1536": activation(nn.SiLU(), 1536),
            "columns 3072 x 576": columns(3072, 576),
            "columns 576 x 1536": columns(576, 1536),
            "outlier columns 3072 x 576": outlier_columns(3072, 576),
            "outlier columns 576 x 1536": outlier_columns(576, 1536),
            "moments, groups of 32": moments(32),
            "factor 1536": factor(1536),
        }
    table = Table("kernel", "ms", "replaced ms", "ratio")
    for name, (ours, other) in found.items():
        table.add_row(name, f"{ours * 1e3:.2f}", f"{other * 1e3:.2f}", f"{other / ours:.2f}")
    Console().print(table)
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "seconds": {name: {"calibrant": ours, "replaced": other} for name, (ours, other) in found.items()},
    }
    options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
