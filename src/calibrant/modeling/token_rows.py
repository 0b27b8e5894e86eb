"""Rows of token ids and which of them count."""

from typing import NamedTuple

import torch


class TokenRows(NamedTuple):
    """``ids`` int ``[rows, length]`` and ``counted`` bool of that shape (True: the token enters statistics)."""

    ids: torch.Tensor
    counted: torch.Tensor

    def model_inputs(self, causal: bool) -> dict[str, torch.Tensor]:
        """Arguments of a model's forward pass.

        A bidirectional model (``causal`` False) also gets an attention mask that ends with a row's last counted token.
        """
        if causal:
            return {"input_ids": self.ids}
        seen = self.counted.flip(1).cumsum(1).flip(1).clamp(max=1)
        return {"input_ids": self.ids, "attention_mask": seen}
