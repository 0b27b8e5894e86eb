"""Train the GPT-2-shaped model of this folder, and the tokenizer that its classifier shares.

    python studies/small_models/train_language_model.py c4.utf8.gz wiki.utf8.gz tiny.utf8.gz \\
        -o studies/small_models/gpt2-shaped

Never quantized, and small enough to be kept with the code: a byte-level BPE of 4,096 tokens, six blocks of width 192,
contexts of 256 tokens, weights in bfloat16. Ten minutes on two cores.
"""

import argparse
from pathlib import Path

import torch
import transformers
from data import read_text
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from torch.nn import functional as F

from training import train

BEGIN, PAD = "<|endoftext|>", "<|pad|>"
VOCABULARY, WIDTH, BLOCKS, HEADS, CONTEXT = 4096, 192, 6, 6, 256


def make_tokenizer(texts: list[str]) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE whose texts begin with ``BEGIN``."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BEGIN, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((line for text in texts for line in text.splitlines(keepends=True)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=BEGIN, pad_token=PAD, model_max_length=CONTEXT
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--rows", type=int, default=16)
    options = parser.parse_args()
    texts = [read_text(path) for path in options.texts]
    tokenizer = make_tokenizer(texts)
    ids = torch.tensor([index for text in texts for index in tokenizer(text, add_special_tokens=False)["input_ids"]])
    print(f"{len(ids):,} tokens")
    torch.manual_seed(0)
    begin = tokenizer.bos_token_id
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=CONTEXT,
        n_embd=WIDTH,
        n_layer=BLOCKS,
        n_head=HEADS,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=begin,
        eos_token_id=begin,
    )
    model = transformers.GPT2LMHeadModel(config)

    def loss(draw: torch.Generator) -> torch.Tensor:
        starts = torch.randint(0, len(ids) - CONTEXT, (options.rows,), generator=draw)
        rows = torch.stack([ids[start : start + CONTEXT - 1] for start in starts])
        rows = F.pad(rows, (1, 0), value=begin)
        logits = model(input_ids=rows).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())

    train(model, loss, options.steps, learning_rate=2e-3)
    model.to(torch.bfloat16).save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)


if __name__ == "__main__":
    main()
