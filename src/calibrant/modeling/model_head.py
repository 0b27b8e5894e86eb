"""What is left of a model after its last hidden states: its head, which makes the logits again.

Logits of a whole vocabulary are a hundred times larger than the hidden states that they are made of.
"""

from collections.abc import Callable

import torch
import transformers
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.generic import ModelOutput

from calibrant.modeling.checkpoint import ModelFolder
from calibrant.modeling.lazy_model import LazyModel

Inputs = dict[str, torch.Tensor]


class ModelHead:
    """What ``model`` computes after its module ``before``, which gives its last hidden states."""

    def __init__(self, model: transformers.PreTrainedModel, before: str) -> None:
        self.model, self.before = model, before

    def logits(self, states: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """Logits ``[rows, length, vocabulary]`` of hidden states ``[rows, length, width]`` of the same ``inputs``."""
        device = self.model.get_output_embeddings().weight.device
        output = _Output(last_hidden_state=states.to(device))
        module = self.model.get_submodule(self.before)
        forward = vars(module).get("forward")
        module.forward = lambda *_, **__: output
        try:
            logits: torch.Tensor = self.model(**_on(device, inputs), use_cache=False).logits
        finally:
            if forward is None:
                del module.forward
            else:
                module.forward = forward
        return logits


class _Output(BaseModelOutput):
    """An output with hidden states, and None for whatever else a model asks of it."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


def lazy_head(folder: ModelFolder, before: str, device: torch.device) -> ModelHead:
    """The head alone of the model in ``folder``, in float32."""
    lazy = LazyModel(folder, torch.float32, device)
    lazy.load_head()
    return ModelHead(lazy.module, before)


def logits_and_states(
    model: transformers.PreTrainedModel, before: str, inputs: Inputs
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits ``[rows, length, vocabulary]``, and what the module ``before`` gave, ``[rows, length, width]``."""
    states: list[torch.Tensor] = []
    hook = model.get_submodule(before).register_forward_hook(lambda _, __, output: states.append(output[0]))
    try:
        return model(**_on(model.device, inputs), use_cache=False).logits, states[0]
    finally:
        hook.remove()


def agree(again: torch.Tensor, logits: torch.Tensor) -> bool:
    """Whether two ways to the same logits agree; products of matrices of other shapes are rounded in another order."""
    return again.shape == logits.shape and torch.allclose(again, logits, rtol=1e-4, atol=1e-4)


def module_before_head(model: transformers.PreTrainedModel, inputs: Inputs) -> str | None:
    """Name of the outermost module whose output the head reads: the last to end of those that gave its input.

    None if there is no such module, or one that gives a plain tensor: it belongs to the head. ``inputs`` are any.
    """
    given: list[tuple[str, torch.Tensor, bool]] = []
    found: list[tuple[str, bool]] = []

    def note(name: str) -> Callable[..., None]:
        def add(_: torch.nn.Module, __: object, output: object) -> None:
            structured = isinstance(output, (tuple, ModelOutput))
            first = output[0] if isinstance(output, (tuple, ModelOutput)) and len(output) else output
            if isinstance(first, torch.Tensor):
                given.append((name, first, structured))

        return add

    def choose(_: torch.nn.Module, read: tuple[torch.Tensor, ...]) -> None:
        same = [
            (name, structured)
            for name, tensor, structured in given
            if tensor is read[0] or tensor.data_ptr() == read[0].data_ptr()
        ]
        found.extend(same[-1:])

    head = model.get_output_embeddings()
    if head is None:
        return None
    hooks = [module.register_forward_hook(note(name)) for name, module in model.named_modules() if module is not head]
    hooks.append(head.register_forward_pre_hook(choose))
    try:
        model(**_on(model.device, inputs), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0][0] if found and found[0][1] else None


def _on(device: torch.device, inputs: Inputs) -> Inputs:
    return {name: value.to(device) for name, value in inputs.items()}
