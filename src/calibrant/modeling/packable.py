"""Trial initialization of a model with packed linears, which transformers cannot load for every architecture."""

import copy
from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel


def first_not_packable(model: PreTrainedModel, linears: Iterable[str]) -> str | None:
    """First linear whose initialization, or whose parent's, needs a ``weight``, which packed linears lack, or None.

    transformers initializes modules with tensors that the checkpoint lacks, and counts packed weights as lacking; the
    initialization of some modules (Mamba) and of some linears (xLSTM) then fails. One module per class and name is
    tried, on the meta device.
    """
    names = list(linears)
    trial = copy.deepcopy(model)
    owners = {name: trial.get_submodule(name) for name in names}
    weights = {name: owner.get_parameter("weight") for name, owner in owners.items()}
    for owner in owners.values():
        del owner.weight
    tried: set[tuple[type[nn.Module], str]] = set()
    for name in names:
        parent, _, leaf = name.rpartition(".")
        for module, kind in ((owners[name], leaf), (trial.get_submodule(parent), "")):
            if (type(module), kind) in tried:
                continue
            tried.add((type(module), kind))
            if _can_initialize(trial, module):
                continue
            for other, owner in owners.items():
                owner.register_parameter("weight", weights[other])
            if _can_initialize(trial, module):
                return name
            for owner in owners.values():
                del owner.weight
    return None


def _can_initialize(model: PreTrainedModel, module: nn.Module) -> bool:
    try:
        with torch.no_grad():
            model._init_weights(module)
    except Exception:  # model code raises anything where a weight is missing
        return False
    return True
