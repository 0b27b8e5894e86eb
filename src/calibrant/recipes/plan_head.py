"""Fits a recipe's ``scheme.lm_head`` to a model, before any weight is read."""

from torch import nn

from calibrant.errors import CalibrantError
from calibrant.formats.quantized import Layout
from calibrant.modeling.lazy_model import LazyModel
from calibrant.quantization.grids import GridSpec
from calibrant.recipes.model_layers import ModelLayers
from calibrant.recipes.plan import HeadPlan, LayerPlan, Target
from calibrant.recipes.recipe import AUTOMATIC_GROUP_SIZES, Recipe


def head_plan(model: LazyModel, layout: Layout, layers: ModelLayers, recipe: Recipe) -> HeadPlan | None:
    """The output matrix with the target that ``recipe`` has for it; None if it stays as it is.

    Raises:
        CalibrantError: the model has none of its own, or no checkpoint of this ``layout`` holds it packed.
    """
    asked = recipe.scheme.lm_head
    if asked is None:
        return None
    if layout.format != "compressed-tensors" or layers.unpackable or recipe.stored_dense:
        if layers.unpackable:
            raise CalibrantError(f"{layers.obstacle}, so a quantized lm_head has no place: leave lm_head out")
        what = recipe.method.name if layout.format == "compressed-tensors" else f"the {layout.format} format"
        raise CalibrantError(f"{what} has no place for a quantized lm_head: leave lm_head out")
    name, head = _output_matrix(model)
    if recipe.ignores(name):
        raise CalibrantError(f"{name} is in the recipe's ignore list and in scheme.lm_head: take it out of one")
    fitting = [size for size in AUTOMATIC_GROUP_SIZES if head.in_features % size == 0]
    size = asked.group_size if asked.group_size != "auto" else fitting[0] if fitting else None
    if size is not None and head.in_features % size:
        raise CalibrantError(f"lm_head: group size {size} does not divide its {head.in_features} inputs; take auto")
    spec = GridSpec(asked.bits, True, size, model.folder.dtype, "mse")
    target = Target(spec, None, Layout(asked.bits, True, size))
    return HeadPlan(name, LayerPlan((head.out_features, head.in_features), target))


def _output_matrix(model: LazyModel) -> tuple[str, nn.Linear]:
    """Name and module of the output matrix.

    Raises:
        CalibrantError: the model has none that is stored alone and is an ordinary linear layer.
    """
    head = model.module.get_output_embeddings()
    name = next((name for name, module in model.module.named_modules() if module is head), None)
    if head is None or name is None:
        raise CalibrantError("this model has no output matrix that transformers finds: leave lm_head out")
    if model.is_tied(f"{name}.weight"):
        raise CalibrantError(
            f"{name} is the embedding too (tied), which neither transformers nor vLLM loads packed: leave lm_head out, "
            "or write a GGUF file, which rounds both"
        )
    if type(head) is not nn.Linear or not model.is_stored_alone(f"{name}.weight"):
        raise CalibrantError(f"{name} is not an ordinary linear layer: leave lm_head out")
    return name, head
