"""Causal attention in bfloat16 on a CPU, block of queries by block of queries.

PyTorch's fused CPU attention runs its bfloat16 products well below the rate of the processor's matrix units. Plain
batched products over blocks of queries, which skip the keys above the diagonal, take about 40 % of its time for
sequences of 512 (``benchmarks/kernels.py``). Scores and probabilities are rounded to bfloat16, as in unfused attention.
"""

import torch

_QUERY_BLOCK = 128


def causal_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention of every position to itself and earlier ones.

    ``query`` ``[batch, heads, length, width]``; ``key``, ``value`` ``[batch, kv heads, length, width]``; ``heads`` is a
    multiple of ``kv heads``. Returns ``[batch, length, heads, width]``.
    """
    batch, heads, length, width = query.shape
    shared = key.shape[1]
    grouped = query.reshape(batch * shared, heads // shared, length, width)
    keys, values = key.reshape(-1, length, width), value.reshape(-1, length, width)
    output = torch.empty(batch, length, shared, heads // shared, width, dtype=query.dtype)
    for begin in range(0, length, _QUERY_BLOCK):
        end = min(begin + _QUERY_BLOCK, length)
        rows = grouped[:, :, begin:end].reshape(batch * shared, -1, width)
        scores = torch.baddbmm(rows.new_empty(1), rows, keys[:, :end].transpose(1, 2), beta=0, alpha=scale)
        future = torch.full((end - begin, end - begin), float("-inf"), dtype=query.dtype).triu(1)
        scores.view(batch * shared, heads // shared, end - begin, end)[..., begin:] += future
        mixed = torch.bmm(torch.softmax(scores, dim=-1), values[:, :end])
        mixed = mixed.view(batch, shared, heads // shared, end - begin, width)
        output[:, begin:end] = mixed.permute(0, 3, 1, 2, 4)
    return output.view(batch, length, heads, width)
