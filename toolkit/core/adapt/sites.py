"""Sites: where a method acts. A layer seen as one matrix, a norm, a whole module.

Every method of the parts that move weights is written for a matrix M of shape (m, n), with m
outputs and n inputs. This file says how the weight of each layer kind is such a matrix:

=========== ====================================== ====================================
kind        weight of the layer                    matrix
=========== ====================================== ====================================
linear      (out, in)                              the weight
hf_conv1d   (in, out)                              its transpose
conv        (out, in / groups, kernel)             (out, in / groups · prod(kernel))
embedding   (entries, features)                    its transpose, (features, entries)
attention   in_proj_weight (3 embed, embed)        the weight
=========== ====================================== ====================================

Two kinds have no such weight: a ``norm`` (a module with a weight of one axis and an ``eps``; its
matrix is (features, 1)), and any other ``module``, such as a whole transformer block, of whose
width m its matrix is (m, 0).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from toolkit.core.adapt.unfit import DTYPES, refuse_weight

KINDS = ("linear", "hf_conv1d", "conv", "embedding", "attention")
"""Layers with one weight matrix."""


@dataclass(frozen=True)
class Site:
    """The facts of one layer that a method needs.

    Attributes:
        name: the layer's name in the model.
        kind: one of :data:`KINDS`.
        rows, cols: shape (m, n) of its matrix.
        parameter: name of the parameter that holds the weight.
        shape: shape of that parameter.
        groups: groups of a convolution, else 1.
        dtype: dtype that new trainable tensors get: the layer's own, or float32 when that is a
            half precision, in which small updates would be rounded away.
        device: device of the weight.
        weight: the frozen weight itself, in the layer's layout; None for a ``module``.
        bias: the frozen bias beside the weight, (m,), or None.
        scores: scores of the matrix's entries measured on data, (m, n), if the method asks for
            them (:mod:`toolkit.core.adapt.scores`).
    """

    name: str
    kind: str
    rows: int
    cols: int
    parameter: str
    shape: tuple[int, ...]
    groups: int
    dtype: torch.dtype
    device: torch.device
    weight: Tensor | None = field(default=None, repr=False, compare=False)
    scores: Tensor | None = field(default=None, repr=False, compare=False)
    bias: Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def bias_parameter(self) -> str:
        """Name of the parameter that holds the bias, if there is one."""
        return "in_proj_bias" if self.kind == "attention" else "bias"

    def to_weight(self, matrix: Tensor) -> Tensor:
        """(m, n) matrix -> view in the layer's own layout."""
        if self.kind in ("hf_conv1d", "embedding"):
            return matrix.T
        return matrix.view(self.shape)

    def to_matrix(self, weight: Tensor) -> Tensor:
        """Weight in the layer's own layout -> (m, n) view."""
        if self.kind in ("hf_conv1d", "embedding"):
            return weight.T
        return weight.reshape(self.rows, self.cols)


def kind_of(layer: nn.Module) -> str | None:
    """The kind of a layer, or None when it has no single weight matrix."""
    if isinstance(layer, nn.Linear):
        return "linear"
    if isinstance(layer, nn.Embedding):
        return "embedding"
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "conv"
    if isinstance(layer, nn.MultiheadAttention):
        return "attention"
    # transformers' Conv1D, recognised by its form so that transformers need not be installed
    if type(layer).__name__ == "Conv1D" and hasattr(layer, "nf") and hasattr(layer, "weight"):
        return "hf_conv1d"
    return "linear" if _is_linear_by_form(layer) else None


def _is_linear_by_form(layer: nn.Module) -> bool:
    """Whether a layer holds one matrix (out, in), says so, and at most a bias beside it.

    So do the linear layers of other libraries. They are called through their own forward.
    """
    own = own_parameters(layer)
    weight = own.get("weight")
    if weight is None or layer._modules or not own.keys() <= {"weight", "bias"}:
        return False
    lazy = is_lazy(weight)
    for outputs, inputs in (("out_features", "in_features"), ("out_channels", "in_channels")):
        shape = getattr(layer, outputs, None), getattr(layer, inputs, None)
        if None not in shape and (lazy or tuple(weight.shape) == shape):
            return True
    return False


def own_parameters(module: nn.Module) -> Mapping[str, nn.Parameter | None]:
    """A module's own parameters by name; none of a TorchScript module, which nobody may change."""
    return {} if isinstance(module, torch.jit.ScriptModule) else module._parameters


def describe(layer: nn.Module, name: str = "") -> Site:
    """The :class:`Site` of a layer.

    Raises:
        TypeError: the layer has no weight that can be read as one matrix.
        ValueError: a setting that adapting cannot honour (``max_norm``, attention with its own
            key or value width, a weight under a parametrisation), or a weight that is quantised,
            sharded, offloaded or not there yet.
    """
    kind = kind_of(layer)
    label = f"{name!r} ({type(layer).__name__})" if name else type(layer).__name__
    if kind is None:
        raise TypeError(
            f"layer {label} cannot be adapted: it has no weight matrix. Choose targets among "
            "Linear, Conv1d/2d/3d, Embedding, MultiheadAttention and transformers' Conv1D layers"
        )
    parameter = "weight"
    if kind == "attention":
        parameter = "in_proj_weight"
        if not layer._qkv_same_embed_dim:
            raise ValueError(
                f"layer {label} has its own kdim or vdim, so it keeps three projection weights "
                "instead of one; leave it out of targets, or build it with equal widths"
            )
    if kind == "embedding" and layer.max_norm is not None:
        raise ValueError(
            f"layer {label} rescales its weight during the forward pass (max_norm), which would "
            "change frozen numbers; leave it out of targets, or set max_norm=None"
        )
    if parameter not in layer._parameters:
        raise ValueError(
            f"layer {label} computes its {parameter} anew at each call (a parametrisation such as "
            "weight_norm); remove that first, or leave the layer out of targets"
        )
    weight = getattr(layer, parameter)
    refuse_weight(weight, label)
    if kind in ("hf_conv1d", "embedding"):
        cols, rows = weight.shape
    else:
        rows, cols = weight.shape[0], math.prod(weight.shape[1:])
    return Site(
        name=name,
        kind=kind,
        rows=rows,
        cols=cols,
        parameter=parameter,
        shape=tuple(weight.shape),
        groups=getattr(layer, "groups", 1) if kind == "conv" else 1,
        dtype=_wide(weight.dtype),
        device=weight.device,
        weight=weight.detach(),
        bias=_bias(layer, "in_proj_bias" if kind == "attention" else "bias"),
    )


def _bias(layer: nn.Module, parameter: str) -> Tensor | None:
    bias = layer._parameters.get(parameter)
    return None if bias is None else bias.detach()


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation by its form: a weight of one axis, and an epsilon."""
    weight = own_parameters(module).get("weight")
    return (
        weight is not None
        and not is_lazy(weight)
        and weight.dim() == 1
        and not module._modules
        and any(hasattr(module, name) for name in ("eps", "epsilon", "variance_epsilon"))
    )


def fits(module: nn.Module, kinds: tuple[str, ...]) -> bool:
    """Whether a module is a site of one of these kinds."""
    if kind_of(module) in kinds or ("norm" in kinds and is_norm(module)):
        return True
    return "module" in kinds and next(module.parameters(), None) is not None


def site_of(module: nn.Module, name: str, kinds: tuple[str, ...]) -> Site:
    """The :class:`Site` of a module for a method that accepts these kinds.

    Raises:
        TypeError, ValueError: see :func:`describe`; or a module whose width cannot be told.
    """
    if kind_of(module) in kinds or not fits(module, kinds):
        return describe(module, name)
    norm = "norm" in kinds and is_norm(module)
    first = module.weight if norm else _first(module)
    refuse_weight(first, f"{name!r} ({type(module).__name__})")
    return Site(
        name=name,
        kind="norm" if norm else "module",
        rows=len(first) if norm else width_of(module, name),
        cols=1 if norm else 0,
        parameter="weight" if norm else "",
        shape=tuple(first.shape) if norm else (),
        groups=1,
        dtype=_wide(first.dtype),
        device=first.device,
        weight=first.detach() if norm else None,
        bias=_bias(module, "bias") if norm else None,
    )


def _first(module: nn.Module) -> Tensor:
    """A tensor that tells where a module computes, and in what: numbers before packed integers."""
    found = list(module.parameters())
    return next((p for p in found if p.dtype in DTYPES and type(p) is nn.Parameter), found[0])


def width_of(module: nn.Module, name: str) -> int:
    """Features that a module reads: those of its first norm or matrix.

    Raises:
        ValueError: the module holds neither.
    """
    for child in module.modules():
        if is_norm(child):
            return len(child.weight)
        if kind_of(child) is not None:
            site = describe(child)
            return site.rows if site.kind == "embedding" else site.cols
    raise ValueError(
        f"module {name!r} ({type(module).__name__}) holds no norm and no layer with a weight "
        "matrix, so its width is not known; name another in targets"
    )


def _wide(dtype: torch.dtype) -> torch.dtype:
    """float32 instead of a half precision, in which small updates would be rounded away."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def uniform(shape: tuple[int, ...], bound: float, site: Site, generator) -> Tensor:
    """U(-bound, bound), drawn where the generator lives, so a seed gives one result."""
    where = generator.device if generator is not None else "cpu"
    draw = torch.empty(shape, dtype=site.dtype, device=where)
    return draw.uniform_(-bound, bound, generator=generator).to(site.device)


def normal(shape: tuple[int, ...], std: float, site: Site, generator) -> Tensor:
    """N(0, std^2), drawn where the generator lives, so a seed gives one result."""
    where = generator.device if generator is not None else "cpu"
    draw = torch.empty(shape, dtype=site.dtype, device=where)
    return draw.normal_(0.0, std, generator=generator).to(site.device)


def with_padding(base: nn.Module, site: Site, new: Tensor) -> Tensor:
    """A new weight with the padding row of an embedding as it was: training never moves that."""
    row = base.padding_idx if site.kind == "embedding" else None
    if row is None:
        return new
    old = base._parameters[site.parameter][row : row + 1].to(new.dtype)
    return new.index_copy(0, torch.tensor([row], device=new.device), old)
