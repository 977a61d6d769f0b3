r"""AdaptFormer and the cosine head: what is trained on top of a frozen foundation model.

One module per block, beside its MLP, with a LayerNorm of its own:

.. math:: x \leftarrow x + \mathrm{MLP}(\mathrm{LN}_2(x)) + s\,(W_{up}\,\mathrm{ReLU}(W_{down}\,
    \mathrm{LN}_a(x) + b_d) + b_u)

:math:`W_{up}` and the biases start at 0 and s at 1, so the network starts as it was. Source: arXiv
2205.13535, in the form of LIFT's code (``models/peft_modules.py``).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.core.nets.anatomy.blocks import Block, find
from toolkit.core.nets.anatomy.form import common, inside, parent
from toolkit.core.nets.residual import ResidualBlock, StreamBlock


class AdaptFormer(nn.Module):
    """The module beside one MLP: (..., width) to the same shape, 0 at the start.

    It trains ``2 width bottleneck + 3 width + bottleneck + 1`` numbers.

    Args:
        width: of the stream.
        bottleneck: units inside.
        generator: draws :math:`W_{down}`, normal with variance 1 / (3 width) (Kaiming, a = sqrt 5).

    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, width: int, bottleneck: int, generator: torch.Generator | None = None):
        super().__init__()
        if width < 1 or bottleneck < 1:
            raise ValueError(f"width={width}, bottleneck={bottleneck}: must be at least 1.")
        self.norm = nn.LayerNorm(width)
        # built without storage: PyTorch's own draw would move the global generator
        self.down = nn.Linear(width, bottleneck, device="meta").to_empty(device="cpu")
        self.up = nn.Linear(bottleneck, width, device="meta").to_empty(device="cpu")
        self.scale = nn.Parameter(torch.ones(1))
        nn.init.kaiming_normal_(self.down.weight, a=math.sqrt(5), generator=generator)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) to (..., width)."""
        return self.scale * self.up(F.relu(self.down(self.norm(x))))


class CosineHead(nn.Module):
    r"""Logits :math:`z_k = \sigma \cos(h, w_k)`.

    Args:
        width: of the features h.
        classes: K.
        scale: :math:`\sigma`; the official code has 25.
        generator: draws the rows of the weight (K, width) on the unit sphere.

    Raises:
        ValueError: a size below 1 or a scale that is not positive.
    """

    def __init__(
        self,
        width: int,
        classes: int,
        scale: float = 25.0,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        if width < 1 or classes < 2 or not scale > 0:
            raise ValueError(f"width={width}, classes={classes}, scale={scale}: out of range.")
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(classes, width))
        self.reset(generator)

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Draw the rows anew."""
        nn.init.normal_(self.weight, generator=generator)
        with torch.no_grad():
            self.weight.div_(self.weight.norm(dim=1, keepdim=True))

    def forward(self, features: Tensor) -> Tensor:
        """(..., width) to (..., K)."""
        if features.dtype in (torch.float16, torch.bfloat16):
            # lengths and products of half precision overflow, and its 1e-12 is 0
            wide = F.normalize(features.float(), dim=-1), F.normalize(self.weight.float(), dim=-1)
            return (F.linear(*wide) * self.scale).to(features.dtype)
        # lengths are divided out of the logits: normalised copies would cost more than the product
        rows = self.scale / torch.linalg.vector_norm(self.weight, dim=-1).clamp_min(1e-12)
        length = torch.linalg.vector_norm(features, dim=-1, keepdim=True).clamp_min(1e-12)
        return F.linear(features, self.weight) * (rows / length)

    @torch.no_grad()
    def set(self, rows: Tensor) -> CosineHead:
        """Start from given directions, such as class means or text features; their length is lost.

        Raises:
            ValueError: another shape than the weight's, or a row that is 0 or not finite.
        """
        if rows.shape != self.weight.shape or not (
            rows.isfinite().all() and (rows.norm(dim=1) > 0).all()
        ):
            raise ValueError(
                f"rows has shape {tuple(rows.shape)}, needs {tuple(self.weight.shape)} and no zero "
                "row: a class without a direction has no cosine."
            )
        self.weight.copy_(F.normalize(rows.to(self.weight), dim=1))
        return self


def class_means(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Unit vectors (K, width): the mean feature of each class, divided by its length.

    Args:
        features: (N, width).
        labels: (N,).
        classes: K.

    Raises:
        ValueError: a class without an example.
    """
    counts = torch.bincount(labels, minlength=classes)
    if (counts == 0).any():
        raise ValueError(f"labels hold no example of class {int(counts.argmin())}.")
    sums = features.new_zeros(classes, features.shape[1]).index_add_(0, labels, features)
    return F.normalize(sums / counts[:, None].to(sums), dim=1)


def bottleneck_for(classes: int, blocks: int) -> int:
    r"""The code's rule, :math:`2^{\max(0, \lfloor\log_2 (K/2L)\rfloor)}`: K classes, L blocks."""
    if classes < 1 or blocks < 1:
        raise ValueError(f"classes={classes}, blocks={blocks}: must be at least 1.")
    return 2 ** max(0, math.floor(math.log2(classes / (2 * blocks))))


class Beside(nn.Module):
    """A block with an AdaptFormer beside its MLP.

    Args:
        block: a ``ResidualBlock`` or ``StreamBlock`` of the toolkit, the ``output`` module of a
            BERT layer of transformers, or the MLP of a pre-LN block, which needs ``norm``.
        adapter: acts on the stream that enters the MLP.
        norm: the LayerNorm before the MLP; the stream is what enters it.
    """

    def __init__(self, block: nn.Module, adapter: AdaptFormer, norm: nn.Module | None = None):
        super().__init__()
        self.block, self.adapter = block, adapter
        self.listens, self.stream = norm is not None, None
        if norm is not None:  # a pre-LN block hands its stream to no other module
            norm.register_forward_pre_hook(self._listen)

    def _listen(self, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.stream = inputs[0]

    def forward(self, *inputs: Tensor) -> Tensor:
        """What the block takes and gives.

        Raises:
            RuntimeError: the MLP of a pre-LN block was run alone.
        """
        if self.listens:
            stream, self.stream = self.stream, None  # hold no activation longer than needed
            if stream is None:
                raise RuntimeError("the MLP ran without the LayerNorm before it: run the block.")
            return self.block(*inputs) + self.adapter(stream)
        if isinstance(self.block, StreamBlock):
            (x,) = inputs
            x = self.block.attend(x)
            return self.block.feed(x) + self.adapter(x)
        if isinstance(self.block, ResidualBlock):
            (x,) = inputs
            return self.block(x) + self.adapter(x)
        # BERT adds the stream inside the module, before its last LayerNorm
        hidden, stream = inputs
        return self.block(hidden, stream + self.adapter(stream))


def add_adaptformer(
    model: nn.Module,
    bottleneck: int,
    last: int | None = None,
    generator: torch.Generator | None = None,
) -> list[AdaptFormer]:
    """Freeze a network and put an AdaptFormer beside the MLP of its blocks, in place.

    Args:
        model: holds ``ResidualBlock`` or ``StreamBlock`` modules, BERT layers, or pre-norm blocks
            with an MLP in a module of its own (:func:`toolkit.core.nets.anatomy`): those of CLIP,
            ViT, GPT-2 and Llama in transformers, and of OpenCLIP, timm and torchvision.
            Of a model with two towers give the one to be adapted, such as ``clip.vision_model``.
        bottleneck: units inside; see :func:`bottleneck_for`.
        last: only the last so many blocks.
        generator: draws the weights.

    Returns:
        The modules; they are all that requires gradients now. (Unfreeze the head, if it trains.)

    Raises:
        ValueError: no such block, fewer than ``last``, a block that scales what its MLP adds
            (LayerScale), or a model that was adapted before; nothing is changed then.
    """
    places = _places(model)
    if not places or (last is not None and not 1 <= last <= len(places)):
        raise ValueError(
            f"last={last}: the model has {len(places)} blocks that an AdaptFormer fits beside "
            "(ResidualBlock, StreamBlock, BERT layers, pre-LN blocks such as those of CLIP)."
        )
    if any(isinstance(module, Beside) for module in model.modules()):
        raise ValueError("the model has AdaptFormers already: start from the foundation model.")
    places = places[-last if last else 0 :]
    for name, _, _, scale in places:
        if scale is not None:
            raise ValueError(
                f"{scale} would scale the AdaptFormer beside {name} too: "
                "use blocks without LayerScale, or place AdaptFormer modules by hand."
            )
    adapters = [AdaptFormer(width, bottleneck, generator) for _, width, _, _ in places]
    model.requires_grad_(False)
    for (name, _, norm, _), adapter in zip(places, adapters, strict=True):
        old = model.get_submodule(name)
        like = next(old.parameters())
        model.set_submodule(name, Beside(old, adapter.to(like.device, like.dtype), norm))
    return adapters


# name of the module that Beside replaces, width of its stream, norm to listen to, its LayerScale
_Place = tuple[str, int, nn.Module | None, str | None]


def _places(model: nn.Module) -> list[_Place]:
    modules = model.named_modules()
    own = [
        (n, m.linear.in_features, None, None) for n, m in modules if isinstance(m, ResidualBlock)
    ]
    return own + [place for block in find(model) if (place := _beside(model, block))]


def _beside(model: nn.Module, block: Block) -> _Place | None:
    if isinstance(block.module, StreamBlock):
        return block.name, block.width, None, None
    if not block.feed_forward or not block.norms:
        return None
    end = parent(block.feed_forward["down"])
    mlp = common(map(parent, block.feed_forward.values()))
    if block.pre_norm is False and mlp != end == parent(block.norms[-1]):
        return end, block.width, None, None  # BERT hands the stream to the module of the last norm
    norms = [name for name in block.norms if not inside(name, mlp)]
    if not block.pre_norm or mlp == block.name or not norms:
        return None
    scales = [name.rpartition(".")[2] for name in block.scales if not name.endswith("1")]
    scale = f"{type(block.module).__name__}.{scales[0]}" if scales else None
    return mlp, block.width, model.get_submodule(norms[-1]), scale
