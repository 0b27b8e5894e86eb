"""GGUF files: what llama.cpp reads in them is the model that transformers loads."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from typer.testing import CliRunner

import calibrant as cb
from calibrant.cli.main import app
from calibrant.errors import CalibrantError
from calibrant.modeling.checkpoint import ModelFolder
from calibrant.modeling.whole_model import load_whole

from ..llama_cpp import ask

SIZE = 400
TEXTS = [
    "Once upon a time, there was a 42 year-old girl; she didn't know it's 1984.",
    " two  spaces\n\nnew\tline, étüde, 日本語 and an emoji 🙂!",
    "x",
]
_CORPUS = [" ".join(TEXTS), "The quick brown fox can't jump over 13 lazy dogs.", "a b c " * 5]
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def sentence_piece(space_first: bool = True) -> Tokenizer:
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps: list[Any] = [normalizers.Replace(" ", "▁")]
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *steps] if space_first else steps)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    named = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    backend.train_from_iterator(_CORPUS, trainers.BpeTrainer(vocab_size=SIZE - 4, special_tokens=named))
    plain = Tokenizer.from_str(backend.to_str())  # bytes are tokens of the vocabulary, no special ones
    definition = json.loads(plain.to_str())
    definition["added_tokens"] = definition["added_tokens"][:3]
    plain = Tokenizer.from_str(json.dumps(definition))
    plain.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return plain


def gemma() -> Tokenizer:
    backend = sentence_piece(space_first=False)
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    return backend


def byte_level(cut: Any, ignore_merges: bool = False) -> Tokenizer:
    backend = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    backend.pre_tokenizer, backend.decoder = cut, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE - 4, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet
    )
    backend.train_from_iterator(_CORPUS, trainer)
    backend.add_tokens([AddedToken("<tool>", normalized=False)])
    return backend


def _split(digits: str) -> Any:
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_WORDS % digits), "isolated"), level])


_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)


def from_gguf(tokenizer: Tokenizer) -> Tokenizer:
    """With a fallback to bytes, for which there are no tokens, and a normalizer without steps."""
    definition = json.loads(tokenizer.to_str())
    definition["model"]["byte_fallback"] = True
    definition["normalizer"] = {"type": "Sequence", "normalizers": []}
    return Tokenizer.from_str(json.dumps(definition))


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "SentencePiece": sentence_piece,
    "SentencePiece without a space first": lambda: sentence_piece(space_first=False),
    "Gemma's": lambda: gemma(),
    "gpt-2": lambda: byte_level(_GPT2),
    "gpt-2, as transformers reads it from a GGUF file": lambda: from_gguf(byte_level(_GPT2)),
    "smollm": lambda: byte_level(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _GPT2])),
    "qwen2": lambda: byte_level(_split("")),
    "llama-bpe": lambda: byte_level(_split("{1,3}"), ignore_merges=True),
}
_SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": SIZE,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": None,
}
# Long waves of a short context, so that all three kinds of frequencies are there.
_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
MODELS: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_SHAPE, tie_word_embeddings=True, attention_bias=True)),
    "llama 3": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_SHAPE, rope_parameters=_ROPE)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**_SHAPE, head_dim=32, sliding_window=None)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_SHAPE)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_SHAPE, head_dim=32)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(
            **{**_SHAPE, "num_hidden_layers": 5},
            head_dim=32,
            query_pre_attn_scalar=32,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
        )
    ),
}


def write(folder: Path, kind: str = "llama", tokenizer: Tokenizer | None = None) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[kind]()
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms of ones and biases of zeros would hide mistakes
                torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.2)
    model.save_pretrained(folder)
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    backend = tokenizer or sentence_piece()
    hf.PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    return folder


def compressed(model: Path, output: Path, recipe: str = "gptq-w4a16-g32", **options: Any) -> Path:
    cb.compress(model, recipe=recipe, output=output, samples=4, length=16, checkpoint_format="gptq", **options)
    return output


def log_probabilities(folder: Path, prompts: list[list[int]]) -> list[torch.Tensor]:
    """Of the token after each prompt, by transformers."""
    model = load_whole(ModelFolder(folder, allow_quantized=True), "cpu", "float32")
    with torch.inference_mode():
        return [model(torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1) for prompt in prompts]


def furthest(model: Path, file: Path, prompts: list[list[int]]) -> float:
    """The largest difference of a token's log-probability after a prompt: transformers' from llama.cpp's."""
    said = ask(file, SIZE, PLAIN, texts=[], prompts=prompts)
    differences = [
        abs(float(theirs[index]) - value)
        for theirs, ours in zip(log_probabilities(model, prompts), said.after, strict=True)
        for index, value in ours.items()
    ]
    assert len(differences) == SIZE * len(prompts)
    return max(differences)


PLAIN = 300
PROMPTS = [[1, 270, 300, 280, 290, 310, 260], [1, 350], [1, *range(260, 300)]]


@pytest.mark.parametrize("kind", MODELS)
def test_llama_cpp_computes_what_transformers_does(tmp_path: Path, kind: str) -> None:
    model = write(tmp_path / "model", kind)
    found = cb.write_gguf(model, output=tmp_path / "model.gguf", embeddings="stored")
    assert set(found.types) == {"F32"}
    # llama.cpp's table of the GELU is float16.
    assert furthest(model, tmp_path / "model.gguf", PROMPTS) < (0.01 if kind == "gemma3" else 0.001)


@pytest.mark.parametrize("kind", MODELS)
def test_llama_cpp_computes_with_the_codes_of_a_compressed_model(tmp_path: Path, kind: str) -> None:
    """To the rounding of activations, which llama.cpp multiplies as int8; a wrong row would be far off."""
    output = compressed(write(tmp_path / "model", kind), tmp_path / "out")
    found = cb.write_gguf(output, output=tmp_path / "out.gguf", embeddings="stored")
    assert found.types["Q4_0"] in (14, 35)
    original = furthest(tmp_path / "model", tmp_path / "out.gguf", PROMPTS)
    assert furthest(output, tmp_path / "out.gguf", PROMPTS) < original / 5


@pytest.mark.parametrize("name", TOKENIZERS)
def test_llama_cpp_reads_texts_as_the_tokenizer_does(tmp_path: Path, name: str) -> None:
    model = write(tmp_path / "model", tokenizer=TOKENIZERS[name]())
    cb.write_gguf(model, output=tmp_path / "model.gguf")
    tokenizer = hf.AutoTokenizer.from_pretrained(model)
    said = ask(tmp_path / "model.gguf", SIZE, PLAIN, texts=TEXTS, prompts=[])
    assert said.tokens == [tokenizer(text).input_ids for text in TEXTS]


def fields(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


def test_the_file_says_what_it_is_and_what_made_it(tmp_path: Path) -> None:
    model = write(tmp_path / "model")
    tokenizer = hf.AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(model)
    output = compressed(model, tmp_path / "out")
    written = cb.write_gguf(output, output=tmp_path / "out.gguf")
    found = fields(tmp_path / "out.gguf")
    assert found["tokenizer.chat_template"] == "{{ messages[0].content }}"
    assert (found["tokenizer.ggml.bos_token_id"], found["tokenizer.ggml.eos_token_id"]) == (1, 2)
    assert found["general.name"] == "model"
    assert found["general.file_type"] == 2
    assert found["calibrant.recipe"] == "gptq-w4a16-g32"
    assert found["calibrant.set_sha256"] == cb.RunRecord.read(output).calibration.set_sha256
    assert written.types == {"F32": 13, "Q4_0": 14, "Q8_0": 1}
    assert written.bytes == (tmp_path / "out.gguf").stat().st_size
    assert any("rounded to Q8_0, the rest is as stored" in note for note in written.notes)
    cb.write_gguf(output, output=tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "out.gguf").read_bytes()


def test_windows_that_llama_cpp_does_not_know_limit_the_context(tmp_path: Path) -> None:
    model = write(tmp_path / "model", "mistral")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "sliding_window": 24}))
    cb.write_gguf(model, output=tmp_path / "model.gguf")
    assert fields(tmp_path / "model.gguf")["llama.context_length"] == 24


@pytest.mark.parametrize(("changed", "said"), [
    ({"layer_types": ["full_attention", *["sliding_attention"] * 4]}, "every n-th layer"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
    ({"query_pre_attn_scalar": 64}, "query_pre_attn_scalar is 64"),
    ({"hidden_activation": "silu"}, "activation silu"),
])  # fmt: skip
def test_what_llama_cpp_has_fixed_in_gemma_is_refused(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    model = write(tmp_path / "model", "gemma3", gemma())
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **changed}))
    with pytest.raises(cb.CalibrantError, match=said):
        cb.write_gguf(model, output=tmp_path / "no.gguf")
    assert not (tmp_path / "no.gguf").exists()


@pytest.mark.parametrize(("recipe", "options", "expected"), [
    ("gptq-w4a16-g32", {"bits": 5}, "Q5_0"), ("gptq-w8a16", {}, "Q8_0"), ("gptq-w4a16-g64", {"group_size": 32}, "Q4_0"),
])  # fmt: skip
def test_every_symmetric_width_has_a_type(tmp_path: Path, recipe: str, options: dict[str, int], expected: str) -> None:
    """And the values in it are those that transformers computes with, which rounds them to the dtype of the scales."""
    output = compressed(write(tmp_path / "model", "qwen2"), tmp_path / "out", recipe, **options)
    assert cb.write_gguf(output, output=tmp_path / "out.gguf", embeddings="stored").types[expected] == 14
    tensor = next(one for one in gguf.GGUFReader(tmp_path / "out.gguf").tensors if one.name == "blk.1.ffn_up.weight")
    model = load_whole(ModelFolder(output, allow_quantized=True), "cpu", "float32")
    stored = model.model.layers[1].mlp.up_proj.weight.detach().numpy()
    decoded = gguf.dequantize(tensor.data, tensor.tensor_type)
    assert np.array_equal(decoded.astype(np.float16), stored)


def test_compressed_tensors_are_written_if_float16_holds_their_scales(tmp_path: Path) -> None:
    model = write(tmp_path / "model")
    options: dict[str, Any] = {"recipe": "gptq-w4a16-g32", "samples": 4, "length": 16}
    cb.compress(model, output=tmp_path / "float32", **options)
    with pytest.raises(cb.CalibrantError, match="scales that float16 does not hold: compress to the gptq"):
        cb.write_gguf(tmp_path / "float32", output=tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()
    half = hf.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    hf.AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "half")
    cb.compress(tmp_path / "half", output=tmp_path / "bfloat16", **options)
    written = cb.write_gguf(tmp_path / "bfloat16", output=tmp_path / "b.gguf", embeddings="stored")
    assert written.types == {"F32": 13, "BF16": 1, "Q4_0": 14}
    assert furthest(tmp_path / "bfloat16", tmp_path / "b.gguf", PROMPTS) < 1.0


def test_what_cannot_be_written_is_one_sentence(tmp_path: Path, model_folder: Callable[[str], Path]) -> None:
    def refused(folder: Path, **options: Any) -> str:
        with pytest.raises(cb.CalibrantError) as caught:
            cb.write_gguf(folder, output=tmp_path / "no.gguf", **options)
        assert not list(tmp_path.glob("no.gguf*"))
        return str(caught.value)

    assert "gpt2 models are not written as GGUF files here" in refused(model_folder("gpt2"))
    assert "its model is WordLevel, not BPE" in refused(model_folder("llama"))
    lower = byte_level(_GPT2)
    lower.normalizer = normalizers.Lowercase()
    assert "its normalizer is Lowercase" in refused(write(tmp_path / "lower", tokenizer=lower))
    cut = byte_level(pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), _GPT2]))
    assert "words are cut in a way" in refused(write(tmp_path / "cut", tokenizer=cut))
    model = write(tmp_path / "model")
    assert "Q3: no such type of embeddings; there are Q8_0, Q6_K, Q5_0, Q4_K, Q4_0, stored" in refused(
        model, embeddings="Q3"
    )
    config = json.loads((model / "config.json").read_text())
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    (model / "config.json").write_text(json.dumps({**config, "rope_parameters": scaled}))
    assert "rope_type linear" in refused(model)
    (model / "config.json").write_text(json.dumps(config))
    cb.compress(
        model, recipe="gptq-w4a16-g128-asym", group_size=32, output=tmp_path / "asymmetric", samples=4, length=16
    )
    assert "asymmetric codes" in refused(tmp_path / "asymmetric")
    for recipe in ("rtn-fp8", "gptq-nvfp4a16"):
        cb.compress(model, recipe=recipe, output=tmp_path / recipe, samples=4, length=16)
        assert "which no type holds without loss" in refused(tmp_path / recipe)
    (tmp_path / "kept.gguf").write_bytes(b"GGUF")
    with pytest.raises(cb.CalibrantError, match="exists"):
        cb.write_gguf(model, output=tmp_path / "kept.gguf")


def test_a_real_model_says_in_llama_cpp_what_it_says_in_transformers(tmp_path: Path, shared_data: Path) -> None:
    """Word for word, where the weights are as they were; its text is that of the compressed model for a while."""
    model = shared_data.parent / "models" / "stories260k"
    recipe = cb.load_recipe("gptq-w8a16").model_copy(update={"ignore": ("down_proj",)})
    calibration = cb.generate(model, samples=8, length=64)
    cb.compress(model, recipe=recipe, group_size=32, output=tmp_path / "out", calibration=calibration,
                checkpoint_format="gptq")  # fmt: skip
    tokenizer = hf.AutoTokenizer.from_pretrained(model)
    prompts = [tokenizer(text).input_ids for text in ("Once upon a time", "Lily and her mom went to the")]
    for folder, tolerance in ((model, 1e-3), (tmp_path / "out", 0.3)):
        file = tmp_path / f"{folder.name}.gguf"
        cb.write_gguf(folder, output=file, embeddings="stored")
        said = ask(file, 512, prompts[0][-1], texts=TEXTS, prompts=prompts, writes=True)
        for ids, after, written in zip(prompts, said.after, said.written, strict=True):
            (ours,) = log_probabilities(folder, [ids])
            assert max(abs(float(ours[index]) - value) for index, value in after.items()) < tolerance
            whole = load_whole(ModelFolder(folder, allow_quantized=True), "cpu", "float32")
            greedy = whole.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0, len(ids) :].tolist()
            assert written[:12] == greedy[:12]


def test_types_of_embeddings_are_spelled_either_way_and_changed_with_a_note(tmp_path: Path) -> None:
    model = write(tmp_path / "model")
    ran = CliRunner().invoke(app, ["gguf", str(model), "-o", str(tmp_path / "a.gguf"), "--embeddings", "q5_0"])
    assert ran.exit_code == 0
    assert "Q5_0" in ran.stdout
    written = cb.write_gguf(model, output=tmp_path / "b.gguf", embeddings="Q6_K")
    assert "token_embd.weight is Q8_0: blocks of Q6_K do not divide its 64 columns" in written.notes


@pytest.mark.parametrize("name", ["mtp_block.0.emb_proj.weight", "speaker.weight", "vision.patch.bias"])
def test_a_tensor_without_a_name_there_is_refused_before_any_work(tmp_path: Path, name: str) -> None:
    source = write(tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    save_file({**tensors, name: torch.ones(4, 4)}, source / "model.safetensors", {"format": "pt"})
    base = re.escape(name.rpartition(".")[0])
    with pytest.raises(CalibrantError, match=rf"{base}: llama\.cpp's llama has no such tensor"):
        cb.prepare(source, output=tmp_path / "out", recipe="gptq-q4_0", samples=4, length=16)
