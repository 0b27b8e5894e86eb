"""Whether transformers opens a module whose linears are packed, found by trying."""

import copy
from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel


def first_not_packable(model: PreTrainedModel, linears: Iterable[str]) -> str | None:
    """The first of ``linears`` around which a module is initialized with its ``weight``, which packed ones lack.

    transformers initializes modules of which the checkpoint lacks a tensor, packed weights among them (Mamba). Modules
    are tried on the meta device, one of each class.
    """
    tried: dict[type[nn.Module], bool] = {}
    for name in linears:
        parent = model.get_submodule(name.rpartition(".")[0])
        if type(parent) not in tried:
            tried[type(parent)] = _initializes(model, parent, packed=True) or not _initializes(model, parent)
        if not tried[type(parent)]:
            return name
    return None


def _initializes(model: PreTrainedModel, module: nn.Module, packed: bool = False) -> bool:
    trial = copy.deepcopy(module)
    if packed:
        for child in trial.children():
            if isinstance(child, nn.Linear):
                del child.weight
    try:
        with torch.no_grad():
            model._init_weights(trial)
    except AttributeError:
        return False
    return True
