"""The loss of every row of token ids under a model."""

import torch
import transformers

# Positions whose logits are made float32 at a time: 128 x a vocabulary of 256,000 x 4 bytes = 131 MB.
_POSITIONS = 128


@torch.inference_mode()
def row_losses(model: transformers.PreTrainedModel, tokens: torch.Tensor, mask: torch.Tensor) -> list[float]:
    """Mean negative log-likelihood (nats) of the counted tokens of each row, each given the tokens before it.

    ``tokens`` int ``[rows, length]``, ``mask`` bool of that shape; the first token of a row has nothing before it and
    does not count. Rows are run one at a time, so a row's loss does not depend on its neighbours. NaN where a row has
    no counted token.
    """
    losses = []
    for row, counted in zip(tokens.long(), mask.bool(), strict=True):
        ids, targets = row[None].to(model.device), row[1:].to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        total = 0.0
        wanted = counted[1:].to(model.device)
        for begin in range(0, len(targets), _POSITIONS):
            part = slice(begin, begin + _POSITIONS)
            log_p = torch.log_softmax(logits[part].float(), dim=-1).gather(1, targets[part, None])[:, 0]
            total -= float(log_p[wanted[part]].double().sum())
        count = int(wanted.sum())
        losses.append(total / count if count else float("nan"))
    return losses
