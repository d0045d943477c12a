r"""Hedgehog: linear attention whose features are learned to give the weights of softmax.

o_i = \sum_j phi_q(q_i)^T phi_k(k_j) v_j / \sum_j phi_q(q_i)^T phi_k(k_j),
phi(x) = [softmax(y), softmax(-y)]   or   [exp(y), exp(-y)],   y = W x + b per head
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core.attach import attention_layers
from foveate.core.calls import standing_in
from foveate.core.card import Card, Needs
from foveate.core.errors import BadInput
from foveate.core.params import choice
from foveate.core.recurrence import Heads, Recurrence
from foveate.core.rows import RowBlock, View
from foveate.core.rule import Sizes
from foveate.core.states import exact
from foveate.replace.linear._calls import calls_of

__all__ = ["Hedgehog", "mimicry_loss"]

# features of softmax are at least this, so that no sum of weights is 0
LEAST = 1e-12
# exponents of keys beyond this would leave float32 when many are summed
STEEPEST = 60.0


@dataclass(frozen=True)
class Hedgehog(Recurrence):
    """Linear attention with one learned map per head, made to mimic softmax.

    Example:
        The maps of a loaded model learn its own weights, on short texts.

        >>> import torch, foveate
        >>> from foveate.replace import Hedgehog
        >>> from foveate.replace.linear.hedgehog import mimicry_loss
        >>> from foveate.testing import tiny
        >>> teacher, student = tiny.model("llama"), tiny.model("llama")
        >>> student = foveate.convert(student, Hedgehog())
        >>> maps = [p for n, p in student.named_parameters() if ".rule." in n]
        >>> learner, losses = torch.optim.Adam(maps, 0.01), []
        >>> for _ in range(3):
        ...     losses.append(mimicry_loss(teacher, student, **tiny.inputs("llama")))
        ...     learner.zero_grad()
        ...     losses[-1].backward()
        ...     learner.step()
        >>> bool(losses[2] < losses[0])
        True

    Args:
        activation: What makes y into features: "softmax" over each half, which is safe at any size, or "exp", the
            elementwise one.
    """

    activation: str = choice("softmax", "softmax", "exp")

    normalised: ClassVar[bool] = True

    card: ClassVar = Card(
        title="The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry",
        year=2024,
        family="linear",
        needs=Needs.QUERIES | Needs.KEYS | Needs.VALUES | Needs.TRAINING,
        equation="o_i = sum_j phi(q_i).phi(k_j) v_j / sum_j phi(q_i).phi(k_j), phi(x) = [act(Wx + b), act(-Wx - b)]",
        differs="the default activation is the two softmaxes of the authors' later code (LoLCATs); exponents of keys "
        "are held within 60; maps of keys are one per key-value head, where that code repeats the keys first; they "
        "begin as the identity; nothing is added to the sum of the weights",
        use="to make a loaded model linear: let the maps learn its weights with `mimicry_loss`, then train the model",
        misleads="maps that have learned the weights do not give the model back without training of the model itself; "
        "the loss cannot fall below the entropy of the softmax weights, and says nothing of longer texts",
        claims=("softmax_mimicry",),
    )
    test_params: ClassVar = ({}, {"activation": "exp"})

    def learned(self, sizes: Sizes) -> nn.Module:
        return Maps(sizes)

    def queries(self, heads: Heads) -> Float[Tensor, "batch heads time key"]:
        assert isinstance(heads.learned, Maps)
        return self.of_queries(heads.learned, heads.q)

    def keys(self, heads: Heads) -> Float[Tensor, "batch kv_heads time key"]:
        assert isinstance(heads.learned, Maps)
        return self.of_keys(heads.learned, heads.k)

    def of_queries(
        self, maps: Maps, q: Float[Tensor, "batch heads time dim"]
    ) -> Float[Tensor, "batch heads time features"]:
        """Features of queries; those of one query may have any common factor, for it cancels."""
        y = maps.q(q)
        if self.activation == "softmax":
            return two_softmaxes(y)
        return torch.exp(torch.cat([y, -y], -1) - y.abs().amax(-1, keepdim=True))

    def of_keys(
        self, maps: Maps, k: Float[Tensor, "batch heads time dim"]
    ) -> Float[Tensor, "batch heads time features"]:
        """Features of keys."""
        y = maps.k(k)
        if self.activation == "softmax":
            return two_softmaxes(y)
        return torch.exp(torch.cat([y, -y], -1).clamp(-STEEPEST, STEEPEST))

    def mimicry(self, maps: Maps, view: View) -> Float[Tensor, ""]:
        r"""Cross-entropy of the weights A of these maps and those of softmax, P: -\sum_j P_ij ln A_ij, mean over i.

        Time and memory are quadratic in the length. Gradients reach the maps alone.

        Args:
            maps: What the layer has learned, its `rule.learned`.
            view: An attention call; its weights are the ones to mimic.
        """
        every = torch.arange(view.queries, device=view.q.device)
        with torch.no_grad():
            p = RowBlock(view, every, 0, view.keys, exact(view.q)).weights
        seen = view.mask.additive(every, 0, view.keys) > -torch.inf
        k = self.of_keys(maps, view.k.detach()).repeat_interleave(view.grouped, 1)
        a = torch.where(seen, self.of_queries(maps, view.q.detach()) @ k.transpose(2, 3), 0.0)
        a = a / a.sum(-1, keepdim=True).clamp_min(torch.finfo(a.dtype).tiny)
        loss = -(p * a.clamp_min(LEAST).log()).sum(-1)
        rows = seen.any(-1)
        if view.mask.valid is not None:
            rows = rows & view.mask.valid[:, None]
        return loss[rows.expand_as(loss)].mean()


class Maps(nn.Module):
    """The maps of one layer.

    Args:
        sizes: Sizes of the layer.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.q, self.k = PerHead(sizes.heads, sizes.head_dim), PerHead(sizes.kv_heads, sizes.head_dim)


class PerHead(nn.Module):
    """One affine map per head, from the identity.

    Args:
        heads: How many.
        dim: Width of a head.
    """

    def __init__(self, heads: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(dim).repeat(heads, 1, 1))
        self.bias = nn.Parameter(torch.zeros(heads, 1, dim))

    def forward(self, x: Float[Tensor, "batch heads time dim"]) -> Float[Tensor, "batch heads time dim"]:
        wide = exact(x)
        return x.to(wide) @ self.weight.to(wide) + self.bias


def two_softmaxes(y: Float[Tensor, "batch heads time dim"]) -> Float[Tensor, "batch heads time features"]:
    """[softmax(y), softmax(-y)], each number at least `LEAST`."""
    return torch.cat([y.softmax(-1), (-y).softmax(-1)], -1).clamp_min(LEAST)


def mimicry_loss(teacher: nn.Module, student: nn.Module, **inputs: Any) -> Float[Tensor, ""]:
    """What the maps of a converted model lack to give the weights of the model that it came from, mean over layers.

    Args:
        teacher: The model as it was; it runs without gradients, and each layer's queries and keys come from it.
        student: The model with `Hedgehog` in some of its layers; it is not run.
        inputs: What the teacher is called with.

    Raises:
        BadInput: no layer of the student has maps.
    """
    calls, losses = calls_of(teacher, **inputs), []
    for module, layer in attention_layers(student).items():
        standing = standing_in(module)
        if standing is not None and isinstance(standing.operator, Hedgehog):
            assert isinstance(standing.learned, Maps)
            losses.append(standing.operator.mimicry(standing.learned, calls[layer.index]))
    if not losses:
        raise BadInput("no layer of the student has maps to train; make it with foveate.convert(model, Hedgehog())")
    return torch.stack(losses).mean()
