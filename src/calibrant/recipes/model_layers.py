"""The layers of a model that a recipe applies to, and what keeps them from being packed."""

from dataclasses import dataclass, field, replace

from torch import nn
from transformers.pytorch_utils import Conv1D

from calibrant.modeling.expert_tensors import expert_tensors, is_split
from calibrant.modeling.find_blocks import blocks_beside
from calibrant.modeling.lazy_model import LazyModel
from calibrant.modeling.linear_use import linear_use
from calibrant.modeling.packable import first_not_packable
from calibrant.modeling.structure import fused_parameters, routers
from calibrant.recipes.plan import LayerPlan, Target
from calibrant.recipes.recipe import Recipe

_NOT_ORDINARY = "is not an ordinary linear layer"


@dataclass(frozen=True)
class ModelLayers:
    """Layers that a recipe applies to: linears with ``(out, in)`` and fused experts.

    ``unpackable`` has what keeps transformers from loading packed weights of this model: names, and what is so about
    each. ``uncalled`` are linears that no text calls, ``routers`` those that choose among fused experts, ``shared``
    those whose weights other layers have too, ``outside`` those for which GPT-OSS's own format has no place; ``joined``
    are fused experts that loaders join, ``flat`` linears with inputs other than ``[rows, length, width]``.
    """

    linears: dict[str, tuple[int, int]]
    fused: dict[str, tuple[int, ...]]
    unpackable: dict[str, str]
    uncalled: list[str]
    routers: list[str]
    outside: list[str] = field(default_factory=list)
    joined: list[str] = field(default_factory=list)
    shared: list[str] = field(default_factory=list)
    flat: list[str] = field(default_factory=list)

    @property
    def left_alone(self) -> frozenset[str]:
        """Linears that stay as they are without being ignored."""
        return frozenset([*self.routers, *self.outside, *self.shared])

    def experts_alone(self) -> "ModelLayers":
        """The fused experts; other linears stay as they are."""
        return replace(self, linears={}, unpackable={}, outside=list(self.linears))

    @property
    def obstacle(self) -> str:
        """The first of ``unpackable`` as a clause; empty if there is none."""
        return next((f"{name} {what}" for name, what in self.unpackable.items()), "")

    def widths(self) -> dict[str, int]:
        """Input width of each layer; both axes of fused experts, whose orientation is not known yet."""
        found = {name: shape[1] for name, shape in self.linears.items()}
        for name, shape in self.fused.items():
            found[name] = shape[2]
            found[f"{name} (other axis)"] = shape[1]
        return found

    def planned(self, target: Target) -> dict[str, LayerPlan]:
        """Plans of all layers, each with ``target``."""
        return {name: LayerPlan(shape, target) for name, shape in [*self.linears.items(), *self.fused.items()]}


def model_layers(model: LazyModel, blocks: list[str], recipe: Recipe) -> ModelLayers:
    found = ModelLayers({}, {}, {}, [], routers(model.module))
    use = linear_use(model.module, blocks)
    for name, module in model.module.named_modules():
        if not any(name.startswith(block + ".") for block in blocks):
            continue
        if name in found.routers or (isinstance(module, nn.Linear | Conv1D) and recipe.ignores(name)):
            continue
        if name in use.uncalled:
            found.uncalled.append(name)
        elif isinstance(module, nn.Linear | Conv1D) and model.is_tied(f"{name}.weight"):
            found.shared.append(name)
        elif isinstance(module, nn.Linear):
            found.linears[name] = (module.out_features, module.in_features)
            if name in use.flat:
                found.flat.append(name)
            # Loaders of quantized formats refuse subclasses (FalconLinear).
            if type(module) is not nn.Linear or not model.is_stored_alone(f"{name}.weight"):
                found.unpackable[name] = _NOT_ORDINARY
            elif name in use.read:
                found.unpackable[name] = "has a weight that the model reads beside the layer's own call"
        elif isinstance(module, Conv1D):
            found.linears[name] = (module.weight.shape[1], module.weight.shape[0])
            found.unpackable[name] = _NOT_ORDINARY
    for name, parameter in fused_parameters(model.module).items():
        if any(name.startswith(block + ".") for block in blocks):
            shape = tuple(parameter.shape)
            if recipe.ignores(name):
                found.unpackable[name] = "is fused and left as it is, beside which no packed layer is loaded"
                continue
            found.fused[name] = shape
            if not expert_tensors(model.module, name, shape):
                found.unpackable[name] = "is fused in checkpoints too"
            elif not is_split(model.module, name):
                found.joined.append(name)
    # transformers unpacks whatever it converts, packed or not; of experts it knows how.
    for name in set(model.converted) - found.fused.keys():
        found.unpackable.setdefault(name, "is made of other tensors while it is loaded")
    if not found.unpackable:
        name = first_not_packable(model.module, found.linears)
        if name is not None:
            found.unpackable[name] = "has a weight that the model's initialization reads"
    return found


def weights_left(model: LazyModel, blocks: list[str], layers: ModelLayers) -> dict[str, int]:
    """Sizes of the weights that stay as they are in the blocks, and in other blocks that a text runs through."""
    planned = {f"{name}.weight" for name in layers.linears} | set(layers.fused)
    return {
        f"{block}.{name}": parameter.numel()
        for block in [*blocks, *blocks_beside(model.module, blocks)]
        for name, parameter in model.module.get_submodule(block).named_parameters()
        if parameter.ndim > 1 and f"{block}.{name}" not in planned and not model.is_shared(f"{block}.{name}", block)
    }
