"""Train the BERT-shaped classifier of this folder: which of MMLU's 57 subjects a question is of.

    python studies/small_models/train_classifier.py test.jsonl.gz --held-out validation.jsonl.gz \\
        --tokenizer studies/small_models/gpt2-shaped -o studies/small_models/bert-classifier

Questions stand with their choices. It shares the tokenizer of the language model beside it, so that this can write
its inputs. Never quantized; four blocks of width 128; six minutes on two cores.
"""

import argparse
from pathlib import Path

import torch
import transformers
from data import LENGTH, read_questions, read_records
from torch.nn import functional as F

from training import train

WIDTH, BLOCKS, HEADS = 128, 4, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", type=Path)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rows", type=int, default=32)
    options = parser.parse_args()
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.tokenizer)
    subjects = sorted({record["subject"] for record in read_records(options.questions)})
    ids, mask, labels = read_questions(options.questions, tokenizer, subjects)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        max_position_embeddings=LENGTH,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=len(subjects),
        id2label=dict(enumerate(subjects)),
        label2id={name: index for index, name in enumerate(subjects)},
    )
    model = transformers.BertForSequenceClassification(config)

    def loss(draw: torch.Generator) -> torch.Tensor:
        rows = torch.randint(0, len(ids), (options.rows,), generator=draw)
        logits = model(input_ids=ids[rows], attention_mask=mask[rows]).logits
        return F.cross_entropy(logits.float(), labels[rows])

    train(model, loss, options.steps, learning_rate=1e-3)
    held_ids, held_mask, held_labels = read_questions(options.held_out, tokenizer, subjects)
    model.to(torch.bfloat16)
    with torch.no_grad():
        logits = torch.cat(
            [
                model(input_ids=rows, attention_mask=seen).logits
                for rows, seen in zip(held_ids.split(64), held_mask.split(64), strict=True)
            ]
        )
    print(f"held-out accuracy {float((logits.argmax(-1) == held_labels).double().mean()):.3f}")
    model.save_pretrained(options.output)
    # Anew: the tokenizer that was used has kept how it cut and padded.
    fresh = transformers.AutoTokenizer.from_pretrained(options.tokenizer, model_max_length=LENGTH)
    fresh.save_pretrained(options.output)


if __name__ == "__main__":
    main()
