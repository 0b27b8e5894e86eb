"""ZSAQ's generator: a language model that writes vectors in another model's embedding space (arXiv 2310.13315).

If the two models share a vocabulary, the reader gets the embeddings of tokens sampled from the generator's
distribution, with the gradient of the expected embedding (a straight-through estimator; ours, because an expected
embedding is not the embedding of any token). Otherwise the reader gets a linear map of the generator's hidden states.
"""

import torch
import transformers
from torch import nn

from calibrant.errors import CalibrantError

_TINY = 1e-6


class Generator(nn.Module):
    """Map seed token ids ``[rows, length]`` to vectors ``[rows, length, width]``, differentiable in the weights.

    Args:
        language_model: a causal language model.
        embeddings: the reader's embedding of every token id, ``[vocabulary, width]``.
        same_vocabulary: sample tokens from the language model's distribution at ``temperature``; otherwise map the
            last hidden state linearly and match every channel's mean and variance to the embeddings (ours: without
            the match, ascent leaves the distribution of embeddings).
        temperature: divides the logits before sampling.
        seed: initializes the linear map.
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
        """Vectors for ``ids``; ``draw`` is the random generator that samples tokens."""
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
    """Input embedding of every token id: ``[vocabulary, width]`` float32.

    Raises:
        CalibrantError: the input embedding is not an ``nn.Embedding``.
    """
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, nn.Embedding):
        raise CalibrantError(f"{type(model).__name__}: a generator needs an nn.Embedding as its input embedding")
    vectors: torch.Tensor = embedding(torch.arange(embedding.num_embeddings, device=model.device))
    return vectors.float()
