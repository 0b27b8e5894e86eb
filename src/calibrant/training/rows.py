"""Rows of token ids, of which some count, and what a model is given of them."""

import torch

# Token ids ``[rows, length]`` and which of them count.
Rows = tuple[torch.Tensor, torch.Tensor]


def model_inputs(rows: Rows, causal: bool) -> dict[str, torch.Tensor]:
    """What a model reads: where a token sees what is behind it, that ends with the last one that counts."""
    ids, counted = rows
    if causal:
        return {"input_ids": ids}
    return {"input_ids": ids, "attention_mask": counted.flip(1).cumsum(1).flip(1).clamp(max=1)}
