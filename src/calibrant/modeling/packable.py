"""Trial initialization of modules with packed linears, which transformers cannot load for every architecture."""

import copy
from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel


def first_not_packable(model: PreTrainedModel, linears: Iterable[str]) -> str | None:
    """First linear whose parent's initialization needs a ``weight``, which packed linears do not have, or None.

    transformers initializes modules with tensors that the checkpoint lacks, and counts packed weights as lacking; the
    initialization of some modules (Mamba) then fails. One module per class is tried, on the meta device.
    """
    packable: dict[type[nn.Module], bool] = {}
    for name in linears:
        parent = model.get_submodule(name.rpartition(".")[0])
        if type(parent) not in packable:
            packable[type(parent)] = _can_initialize(model, parent, packed=True) or not _can_initialize(model, parent)
        if not packable[type(parent)]:
            return name
    return None


def _can_initialize(model: PreTrainedModel, module: nn.Module, packed: bool = False) -> bool:
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
