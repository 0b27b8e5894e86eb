"""ZSAQ's generator: a language model whose output enters another model's embedding space (arXiv 2310.13315).

Where the vocabularies are one, the other model reads embeddings of tokens drawn from the generator's distribution, and
gradients go as if it had read the distribution's mean of them (straight through; ours: means themselves are no
embeddings). Else it reads a linear image of the generator's hidden states.
"""

import torch
import transformers
from torch import nn

from calibrant.errors import CalibrantError

_TINY = 1e-6


class Generator(nn.Module):
    """Vectors ``[rows, length, width]`` for token ids ``[rows, length]`` (its seeds), differentiable in its weights.

    Args:
        language_model: a causal language model.
        embeddings: what the reader reads for every id of its vocabulary, ``[vocabulary, width]``.
        same_vocabulary: draw tokens by the language model's probabilities at ``temperature``; else map its last
            hidden state linearly (weights drawn from ``seed``), with mean and variance of every channel those of the
            embeddings (ours: otherwise ascent leaves what embeddings look like).
    """

    def __init__(
        self,
        language_model: transformers.PreTrainedModel,
        embeddings: torch.Tensor,
        same_vocabulary: bool,
        temperature: float,
        seed: int,
    ) -> None:
        super().__init__()
        self.language_model = language_model
        self.vocabulary = int(language_model.config.get_text_config().vocab_size)
        self._temperature = temperature
        self._embeddings: torch.Tensor
        self.register_buffer("_embeddings", embeddings, persistent=False)
        self.adapter: nn.Linear | None = None
        if not same_vocabulary:
            width = int(language_model.config.get_text_config().hidden_size)
            self.adapter = nn.Linear(width, embeddings.shape[1], bias=False, device=embeddings.device)
            draw = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                self.adapter.weight.copy_(torch.randn(self.adapter.weight.shape, generator=draw) / width**0.5)

    def forward(self, ids: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
        """``draw`` decides which tokens are drawn."""
        found = self.language_model(input_ids=ids, use_cache=False, output_hidden_states=self.adapter is not None)
        if self.adapter is None:
            probabilities = torch.softmax(found.logits.float() / self._temperature, -1)
            drawn = torch.multinomial(probabilities.detach().flatten(0, 1), 1, generator=draw).view(ids.shape)
            mean = probabilities @ self._embeddings
            return self._embeddings[drawn] + (mean - mean.detach())
        mapped = self.adapter(found.hidden_states[-1].float())
        spread, mean = torch.std_mean(mapped, 1, keepdim=True)
        wanted_spread, wanted_mean = torch.std_mean(self._embeddings, 0)
        matched: torch.Tensor = (mapped - mean) / (spread + _TINY) * wanted_spread + wanted_mean
        return matched


@torch.no_grad()
def read_embeddings(model: transformers.PreTrainedModel) -> torch.Tensor:
    """What ``model`` makes of every token id alone, before its first block: ``[vocabulary, width]`` float32.

    Raises:
        CalibrantError: its input embedding is no module that maps ids to vectors.
    """
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, nn.Embedding):
        raise CalibrantError(f"{type(model).__name__}: its input embedding is none that a generator could write for")
    vectors: torch.Tensor = embedding(torch.arange(embedding.num_embeddings, device=model.device))
    return vectors.float()
