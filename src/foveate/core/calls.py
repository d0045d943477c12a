"""From what a model hands to its attention function to an attention call of ours."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from foveate.core.rows import Layer, View
from foveate.core.standing import Standing

__all__ = ["call_of", "few_logits", "standing_in"]

OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "c_proj", "o", "dense", "wo")


def call_of(
    module: torch.nn.Module,
    query: Tensor,
    layer: Layer,
    *,
    value_dim: int,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
) -> Callable[..., View]:
    """The call of a model's attention module, still without its keys, values and mask: `call(key, value, mask)`."""
    return partial(
        View,
        query,
        scale=scaling if scaling is not None else query.shape[3] ** -0.5,
        softcap=softcap,
        sinks=s_aux,
        bias=position_bias,
        dropout=dropout if module.training else 0.0,
        projection=output_projection(module, query.shape[1] * value_dim),
        layer=layer,
        **rule_of(module),
    )


def standing_in(module: torch.nn.Module) -> Standing | None:
    """What stands in an attention module in the place of softmax, if anything does."""
    found = module._modules.get("rule")
    return found if isinstance(found, Standing) else None


def rule_of(module: torch.nn.Module) -> dict[str, Any]:
    """The rule of an attention module, as fields of a call."""
    standing = standing_in(module)
    if standing is None:
        return {}
    return {
        "rule": standing.operator,
        "learned": standing.learned,
        "hidden": standing.hidden,
        "training": module.training,
    }


def output_projection(module: torch.nn.Module, inner: int) -> Tensor | None:
    """The weight that takes the concatenated heads back to the model's width, as [model_dim, inner].

    None where the model keeps it outside of the module that computes attention (BERT).
    """
    for name in OUTPUT_PROJECTIONS:
        child = getattr(module, name, None)
        weight = getattr(child, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim == 2:
            # GPT-2's Conv1D stores its weight transposed
            weight = weight if isinstance(child, torch.nn.Linear) else weight.T
            if weight.shape[1] == inner:
                return weight
    return None


def few_logits(model: Any) -> dict[str, int]:
    """How a model is asked for the logits of the last token alone, where it can be: those of a prompt outweigh it."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
