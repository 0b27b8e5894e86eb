"""What models make of a few prompts."""

from collections.abc import Sequence
from typing import Any

import torch
import transformers

from calibrant.errors import CalibrantError
from calibrant.modeling.checkpoint import ModelFolder
from calibrant.modeling.quietly import quietly
from calibrant.modeling.tokenizer import Tokenizer
from calibrant.modeling.whole_model import load_whole
from calibrant.progress import Progress

# Ours: facts, a story and code show different losses.
PROMPTS = (
    "The three most important things about the sea are",
    "Once upon a time, in a small village,",
    "Water boils at 100 degrees Celsius because",
    "def fibonacci(n):",
)
NEW_TOKENS = 48


def continuations(
    folder: ModelFolder, prompts: Sequence[str], device: str, dtype: str, progress: Progress
) -> list[str]:
    """The greedy continuation of every prompt by ``NEW_TOKENS`` tokens, or fewer where the text or the context ends.

    The folder's own settings of generation do not count, only the ids that end a text.

    Raises:
        CalibrantError: the model is not causal or cannot be loaded, or a prompt does not fit.
    """
    if not folder.causal:
        raise CalibrantError(f"{folder.path}: {folder.architecture} is no causal language model, so it writes no text")
    tokenizer = Tokenizer(folder.path)
    ids = [list(tokenizer.hf(prompt, verbose=False)["input_ids"]) for prompt in prompts]
    context = folder.context_length
    for prompt, own in zip(prompts, ids, strict=True):
        if not own or (context is not None and len(own) >= context):
            raise CalibrantError(f"prompt {prompt[:40]!r}: has {len(own)} tokens, which {folder.path} cannot continue")
    model: Any = load_whole(folder, device, dtype)
    written = []
    with progress.task("continuing prompts", len(ids), "prompts") as task, quietly(), torch.inference_mode():
        for own in ids:
            settings = transformers.GenerationConfig(
                do_sample=False,
                max_new_tokens=NEW_TOKENS if context is None else min(NEW_TOKENS, context - len(own)),
                eos_token_id=model.generation_config.eos_token_id,
                pad_token_id=0,
            )
            given = torch.tensor([own], device=model.device)
            tokens = model.generate(given, attention_mask=torch.ones_like(given), generation_config=settings)
            written.append(str(tokenizer.hf.decode(tokens[0, len(own) :], skip_special_tokens=True)))
            task.advance()
    return written
