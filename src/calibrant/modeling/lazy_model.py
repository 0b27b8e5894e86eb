"""A model whose weights stay on disk: parameters are on the meta device, and parts are loaded and dropped as needed."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    build_glob_alternation,
    convert_and_load_state_dict_in_model,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictConfig

from calibrant.errors import CalibrantError, first_line
from calibrant.modeling.checkpoint import ModelFolder, model_class
from calibrant.modeling.expert_tensors import split_experts
from calibrant.modeling.quietly import quietly
from calibrant.modeling.tensor_sources import account_for_tensors
from calibrant.wording import and_more


class LazyModel:
    """The module tree of a model folder with parameters on the meta device.

    transformers' conversion rules map checkpoint names to parameter names. Checkpoints whose layout differs from the
    modules (experts stored separately, legacy names) thus load and save like others.

    Args:
        folder: the model.
        dtype: dtype of loaded parameters.
        device: device of loaded parameters.
        computes: dtype that the model will compute in, for which it makes its buffers; by default that of parameters.

    Raises:
        CalibrantError: the configuration makes no model, the checkpoint lacks weights of a parameter or stores them in
            another shape, or it holds tensors that belong to a layer which does not take them.
    """

    def __init__(
        self, folder: ModelFolder, dtype: torch.dtype, device: torch.device, computes: torch.dtype | None = None
    ) -> None:
        self.folder, self.dtype, self.device = folder, dtype, device
        computes = computes or dtype
        self.module = _skeleton(folder, computes, device)
        # Which parameters and buffers the model wants in float32, whatever it computes in.
        self._dtype_plan: dict[str, torch.dtype] = self.module._get_dtype_plan(computes)
        self._wide = _matching(self.module, list(self._dtype_plan))
        for name, parameter in self.module.named_parameters():
            if name not in self._wide:
                parameter.data = parameter.data.to(dtype)
        self._dtypes = {
            (module, name): parameter.dtype
            for module in self.module.modules()
            for name, parameter in module.named_parameters(recurse=False)
        }
        for experts in split_experts(self.module, folder.tensors):
            folder.join(experts)
        self._rules = get_model_conversion_mapping(self.module)
        self._stored = account_for_tensors(self.module, self._rules, folder.tensors, folder.path)
        self._sources = self._stored.of
        for name, parameter in self.module.named_parameters():
            if self.is_stored_alone(name):
                stored = self.stored_name(name)
                self._check_shape(stored, folder.tensors[stored].shape, parameter.shape)

    def _check_shape(self, name: str, stored: Sequence[int], wanted: Sequence[int]) -> None:
        if tuple(stored) != tuple(wanted):
            raise CalibrantError(
                f"{self.folder.path}: {name} is stored with shape {tuple(stored)}, where config.json describes "
                f"{tuple(wanted)}; copy or download the model again"
            )

    @property
    def notes(self) -> list[str]:
        """Sentences on what the folder holds beyond the model that transformers loads."""
        notes = []
        unused = self._stored.unused
        if unused:
            more = and_more(len(unused) - 1, "tensor")
            notes.append(f"copied as they are, since no parameter of the model takes them: {unused[0]}{more}")
        unread = self.folder.unread
        if unread:
            more = and_more(len(unread) - 1, "file")
            notes.append(f"not read, since transformers loads other weights from the folder: {unread[0].name}{more}")
        return notes

    @property
    def unused(self) -> tuple[str, ...]:
        """Names of the stored tensors that no parameter takes."""
        return self._stored.unused

    def is_stored_alone(self, parameter: str) -> bool:
        """Whether the checkpoint stores this parameter as a single tensor of the same shape."""
        return len(self._sources.get(parameter, ())) == 1 and parameter not in self._stored.converted

    def stored_dtype(self, parameter: str) -> torch.dtype:
        """The dtype in which a changed parameter is stored: float32 where the model wants that, else the folder's."""
        return torch.float32 if parameter in self._wide else self.folder.dtype

    def is_tied(self, parameter: str) -> bool:
        """Whether another parameter of the model has the same values."""
        tied = self.module.all_tied_weights_keys
        return parameter in tied or parameter in tied.values()

    @property
    def converted(self) -> list[str]:
        """Parameters that transformers computes from the stored tensors while it loads them."""
        return sorted(self._stored.converted)

    def stored_name(self, parameter: str) -> str:
        """Name in the checkpoint of a parameter that ``is_stored_alone``."""
        return self._sources[parameter][0]

    def checkpoint_names(self, prefix: str) -> list[str]:
        """Names in the checkpoint of the tensors that fill the module at ``prefix``."""
        dotted = prefix + "."
        return [name for target, names in self._sources.items() if target.startswith(dotted) for name in names]

    def is_shared(self, parameter: str, prefix: str) -> bool:
        """Whether ``parameter``, in the module at ``prefix``, is stored under the name of one outside this module."""
        main = self.module.all_tied_weights_keys.get(parameter)
        return main is not None and parameter not in self._sources and not main.startswith(f"{prefix}.")

    @contextlib.contextmanager
    def loaded(self, prefix: str) -> Iterator[nn.Module]:
        """Load the weights of the module at ``prefix``, yield the module, and drop the weights on exit."""
        module = self.module.get_submodule(prefix)
        mains = {
            name: self.module.all_tied_weights_keys[f"{prefix}.{name}"]
            for name, _ in module.named_parameters()
            if self.is_shared(f"{prefix}.{name}", prefix)
        }
        self.load(self.checkpoint_names(prefix) + [name for main in mains.values() for name in self._sources[main]])
        for name, main in mains.items():
            owner, _, leaf = name.rpartition(".")
            module.get_submodule(owner).register_parameter(leaf, self.module.get_parameter(main))
            self.drop(self.module.get_submodule(main.rpartition(".")[0]))
        try:
            yield module
        finally:
            self.drop(module)

    def load(self, names: list[str]) -> None:
        """Read the checkpoint tensors ``names`` into their parameters.

        Raises:
            CalibrantError: a tensor cannot be read or does not fit the configuration.
        """
        state = {self._stored.renamed.get(name, name): self.folder.read(name) for name in names}
        settings = LoadStateDictConfig(
            device_map={"": self.device},
            dtype=self.dtype,
            dtype_plan=self._dtype_plan,
            weight_mapping=get_model_conversion_mapping(self.module),  # type: ignore[arg-type]  # typed for one subclass of rules
        )
        with quietly():
            info, _ = convert_and_load_state_dict_in_model(self.module, state, settings)
        for name, stored, wanted in info.mismatched_keys:
            self._check_shape(name, stored, wanted)
        problems = [*info.error_msgs, *map(str, info.conversion_errors)]
        if problems:
            raise CalibrantError(f"{self.folder.path}: weights do not fit the configuration ({problems[0]})")

    def cast(self, prefix: str, dtype: torch.dtype, copy: bool = False) -> None:
        """Cast the parameters of the module at ``prefix`` to ``dtype``, but those that the model wants in float32.

        Buffers (rotary frequencies) keep theirs.
        """
        module = self.module.get_submodule(prefix)
        for name, parameter in module.named_parameters():
            full = f"{prefix}.{name}" if prefix else name
            if parameter.device.type != "meta":
                parameter.data = parameter.data.to(torch.float32 if full in self._wide else dtype, copy=copy)

    def names_outside(self, prefixes: list[str]) -> list[str]:
        """Names of the checkpoint tensors outside the modules at ``prefixes``: embeddings, final norm, head."""
        inside = tuple(prefix + "." for prefix in prefixes)
        return [n for target, names in self._sources.items() if not target.startswith(inside) for n in names]

    def check_finite(self, prefixes: list[str], ids: torch.Tensor | None) -> list[str]:
        """Check that the weights outside the modules at ``prefixes`` are finite; returns sentences for the user.

        Rows of an embedding that is not tied to the head matter only if their token occurs: ``ids`` are the token ids
        (int, any shape) that do, None if they are not known.

        Raises:
            CalibrantError: a weight is not finite.
        """
        notes = []
        embedding = self._untied_embedding()
        for name in self.names_outside(prefixes):
            tensor = self.folder.read(name)
            if not tensor.is_floating_point() or bool(tensor.isfinite().all()):
                continue
            rows = (~tensor.isfinite()).flatten(1).any(1).nonzero()[:, 0] if name == embedding else None
            if rows is None or (ids is not None and bool(torch.isin(rows, ids.cpu()).any())):
                raise CalibrantError(
                    f"{self.folder.tensors[name].file}: tensor {name} has values that are not finite; "
                    "copy or download it again"
                )
            notes.append(f"{name} has {len(rows)} rows with values that are not finite, the first is {int(rows[0])}")
        return notes

    def _untied_embedding(self) -> str | None:
        """Checkpoint name of the input embedding, if no other parameter shares its values."""
        embedding = self.module.get_input_embeddings()
        names = [f"{name}.weight" for name, module in self.module.named_modules() if module is embedding]
        return next((self.stored_name(n) for n in names if n in self._sources and not self.is_tied(n)), None)

    def load_outside(self, prefixes: list[str]) -> None:
        """Load the base model's weights outside the blocks at ``prefixes``: embeddings, final norm."""
        inside = tuple(prefix + "." for prefix in prefixes)
        base = self.module.base_model_prefix + "."
        wanted = [target for target in self._sources if not target.startswith(inside)]
        without_head = [target for target in wanted if target.startswith(base)]
        self.load([name for target in without_head or wanted for name in self._sources[target]])
        if not without_head:
            self.module.tie_weights()

    def load_head(self) -> None:
        """Load the weights of the head alone, or the embedding's that it is tied to."""
        head = self.module.get_output_embeddings()
        tied = self.module.all_tied_weights_keys
        own = [name for name, module in self.module.named_modules() if module is head]
        targets = [f"{name}.{leaf}" for name in own for leaf, _ in head.named_parameters()]
        stored = [target if target in self._sources else tied[target] for target in targets]
        self.load([name for target in stored for name in self._sources[target]])
        self.module.tie_weights()

    def drop(self, module: nn.Module) -> None:
        """Free the module's parameters and reset their dtypes, so that casts do not affect the next load."""
        for child in module.modules():
            for name, parameter in list(child.named_parameters(recurse=False)):
                empty = parameter.to("meta", self._dtypes[child, name])
                child.register_parameter(name, nn.Parameter(empty, requires_grad=False))

    def to_checkpoint(self, parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Convert parameters to checkpoint tensors: the inverse of ``load``, for the parameters loaded last."""
        reverted: dict[str, torch.Tensor] = revert_weight_conversion(self.module, parameters)
        return reverted


def _matching(module: nn.Module, patterns: list[Any]) -> frozenset[str]:
    """Names of parameters and buffers that one of transformers' ``patterns`` is in."""
    if not patterns:
        return frozenset()
    expression, _, _ = build_glob_alternation(patterns)
    names = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    return frozenset(name for name in names if expression.search(name))


def _skeleton(folder: ModelFolder, dtype: torch.dtype, device: torch.device) -> transformers.PreTrainedModel:
    """The model with parameters on the meta device; buffers are computed rather than stored, so they are real."""
    wanted = model_class(folder.architecture)
    try:
        with init_empty_weights(include_buffers=False), quietly():
            model: transformers.PreTrainedModel = wanted._from_config(folder.config, dtype=dtype)
    except Exception as error:  # invalid configurations raise any exception in the model classes
        raise CalibrantError(
            f"{folder.path}: no model can be made from its config.json ({first_line(error)})"
        ) from error
    if model._can_set_experts_implementation():
        # Only the eager loop computes one product per expert, which statistics per expert need.
        model.set_experts_implementation("eager")
    model.requires_grad_(False).eval()
    for name, buffer in list(model.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        persistent = leaf not in model.get_submodule(owner)._non_persistent_buffers_set
        model.get_submodule(owner).register_buffer(leaf, buffer.to(device), persistent=persistent)
    return model
