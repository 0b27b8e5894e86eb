"""What it takes a model to write text, before it writes any. The constants are rough and ours."""

import math

from calibrant.modeling.checkpoint import ModelFolder

# Rows that are written at a time where memory allows it.
BATCH_SIZE = 64
# How far the writing may be from its estimate, either way.
SPREAD = 2.0
# A token of each row costs a pass over all weights, however few the rows are: about as long as the products of so many
# further rows. Beside it a block costs its calls.
_FURTHER_ROWS, _SECONDS_PER_BLOCK = 48, 0.4e-3
# Attention and norms beside products of matrices.
_BESIDE_PRODUCTS = 1.5


def writing_seconds(weights: int, blocks: int, samples: int, length: int, rate: float) -> float:
    """Seconds for ``samples`` rows of ``length`` tokens, with ``weights`` numbers at ``rate`` FLOPs a second."""
    passes = math.ceil(samples / BATCH_SIZE) * length
    rows = min(samples, BATCH_SIZE) + _FURTHER_ROWS
    return passes * (_BESIDE_PRODUCTS * 2.0 * weights * rows / rate + _SECONDS_PER_BLOCK * blocks)


def cache_bytes(folder: ModelFolder, element: int) -> int:
    """Bytes of a token's keys and values in all blocks, in numbers of ``element`` bytes."""
    text = folder.config.get_text_config()  # whose attributes know other spellings, such as GPT-2's
    heads = getattr(text, "num_attention_heads", None) or 1
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    keys = getattr(text, "num_key_value_heads", None) or heads
    layers = getattr(text, "num_hidden_layers", 1)
    return int(2 * keys * width * layers * element)
