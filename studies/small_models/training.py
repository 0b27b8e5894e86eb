"""The loop that both small models are trained by."""

from collections.abc import Callable

import torch
import transformers

_WARM_UP = 0.05


def train(
    model: transformers.PreTrainedModel,
    loss: Callable[[torch.Generator], torch.Tensor],
    steps: int,
    learning_rate: float,
) -> None:
    """AdamW, a linear warm-up, then a cosine; products in bfloat16. ``loss`` draws its rows from the generator."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.1, betas=(0.9, 0.95))
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, round(_WARM_UP * steps), steps)
    draw = torch.Generator().manual_seed(0)
    model.train()
    mean = 0.0
    for step in range(1, steps + 1):
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(draw)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        mean += (float(value.detach()) - mean) / min(step, 50)
        if step % 50 == 0 or step == steps:
            print(f"step {step} of {steps}, loss {mean:.3f}", flush=True)
    model.eval()
