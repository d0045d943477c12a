"""An operator as it stands in one attention layer: its parameters there, what it is called, what its cache is."""

from __future__ import annotations

import inspect
import json
from typing import Any

import torch
from torch import Tensor

from foveate.core import registry
from foveate.core.errors import BadInput, NotSupported
from foveate.core.mask import Mask
from foveate.core.masking import as_mask
from foveate.core.mixer import Mixer, StateLayer, Tokens
from foveate.core.recurrence import Heads, Recurrence
from foveate.core.rows import Rows, View, attend
from foveate.core.rule import Operator, Rule, Sizes
from foveate.core.written import read, written

__all__ = [
    "CACHES",
    "OTHERS",
    "Mixed",
    "Standing",
    "auxiliary_loss",
    "called",
    "check_form",
    "flowed",
    "named",
    "recalled",
    "use_cache",
]

# what attention modules of transformers call their cache, and another sequence that they look at
CACHES = ("past_key_values", "past_key_value", "layer_past")
OTHERS = ("key_value_states", "encoder_hidden_states")
# where a transformers cache remembers whose keys and values its layers hold
MARK = "foveate_operator"


class Standing(torch.nn.Module):
    """An operator in one layer, as the child `rule` of the module that computes attention.

    The state dict says which operator it is (`rule._extra_state`, its name and parameters as bytes of JSON), so that
    weights are not taken for those of another one.

    Args:
        operator: The rule, recurrence or mixer.
        sizes: Sizes of the layer.
    """

    def __init__(self, operator: Operator, sizes: Sizes) -> None:
        super().__init__()
        self.operator, self.sizes = operator, sizes
        if isinstance(operator, Mixer):
            self.learned: torch.nn.Module | None = operator.module(sizes)
        else:
            assert isinstance(operator, Rule | Recurrence)
            self.learned = operator.learned(sizes)
        # of the running call, and of the last one in training
        self.hidden: Tensor | None = None
        self.layer: StateLayer | None = None
        self.loss: Tensor | None = None

    @property
    def as_rule(self) -> Rule:
        """The operator, which is no mixer."""
        assert isinstance(self.operator, Rule)
        return self.operator

    def attend(self, view: View) -> Rows:
        """Attention of one call by the rule, its loss noted where it has one."""
        wanted = self.as_rule.needs() if view.training and self.as_rule.trains else ()
        rows = attend(view, wanted)
        self.note(rows)
        return rows

    def note(self, rows: Rows) -> None:
        """Keeps what the rule adds to the loss of a model in training."""
        if rows.view.training and self.as_rule.trains:
            self.loss = self.as_rule.loss(rows)

    def mix(self, x: Tensor, mask: Mask, cache: Any = None) -> Tensor:
        """The output of a mixer for the tokens of one call; its state is in the layer's place of the cache."""
        assert self.learned is not None
        tokens = Tokens.of(x, mask, self.training)
        layer = None if cache is None else state_layer(cache, self.sizes.layer, self.operator)
        out, state = self.learned(tokens, None if layer is None else layer.state)
        if layer is not None:
            layer.state, layer.seen, layer.is_initialized = state, layer.seen + x.shape[1], True
        return torch.where(tokens.real[..., None], out, 0.0).to(x.dtype)

    def heads(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, mask: Mask, scale: float | None = None) -> Heads:
        """The new tokens of one call, as a recurrence gets them."""
        tokens = Tokens.of(x, mask, self.training, packed=True)
        if not bool(tokens.real.all()):
            q, k, v = (torch.where(tokens.real[:, None, :, None], t, 0.0) for t in (q, k, v))
        return Heads(q, k, v, tokens, q.shape[3] ** -0.5 if scale is None else scale, self.learned, self.sizes)

    def flow(self, heads: Heads, layer: StateLayer | None) -> Tensor:
        """Head outputs of a recurrence for the new tokens of one call; its state is in a layer of a cache."""
        assert isinstance(self.operator, Recurrence)
        out, state = self.operator.flow(heads, None if layer is None else layer.state)
        if layer is not None:
            layer.state, layer.seen, layer.is_initialized = state, layer.seen + heads.q.shape[2], True
        return torch.where(heads.tokens.real[:, None, :, None], out, 0.0).to(heads.q.dtype)

    def __getstate__(self) -> dict[str, Any]:
        # a copy is of the layer, not of the call that is running in it
        return self.__dict__ | {"hidden": None, "loss": None, "layer": None}

    def extra_repr(self) -> str:
        return repr(self.operator)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(list(json.dumps(named(self.operator)).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Raises `BadInput`: the weights are those of another operator."""
        found = json.loads(bytes(state.tolist()))
        if found != named(self.operator):
            raise BadInput(
                f"these weights are of {described(found)}, and the layer has {described(named(self.operator))}: make "
                "it with the rule that was saved"
            )


class Mixed(torch.nn.Module):
    """A mixer in the place of a model's attention module, called as that one was.

    Args:
        rule: The mixer as it stands there.
        takes: Names of what the module is called with, in order.
        is_causal: Whether it sees no later token where the model says nothing.
        layer_idx: The number of its cache.
    """

    def __init__(self, rule: Standing, takes: tuple[str, ...], is_causal: bool, layer_idx: int | None) -> None:
        super().__init__()
        self.rule, self.takes, self.is_causal, self.layer_idx = rule, takes, is_causal, layer_idx

    @classmethod
    def of(cls, module: torch.nn.Module, standing: Standing) -> Mixed:
        """In the place of this one.

        Raises:
            NotSupported: its model wants more than an output from it.
        """
        takes = module.takes if isinstance(module, Mixed) else tuple(inspect.signature(type(module).forward).parameters)
        if "position_bias" in takes:
            raise NotSupported(
                f"{type(module).__name__} makes the positions of all layers, so no mixer can take its place; a rule can"
            )
        causal = bool(getattr(module, "is_causal", True))
        return cls(standing, takes, causal, getattr(module, "layer_idx", None)).train(module.training)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """The output, and None for the weights that there are not."""
        given = dict(zip(self.takes[1:], args, strict=False)) | kwargs
        x = given["hidden_states"]
        if any(given.get(name) is not None for name in OTHERS):
            raise NotSupported(f"{type(self.rule.operator).__name__} mixes one sequence and cannot look at another one")
        cache = next((given[name] for name in CACHES if given.get(name) is not None), None)
        seen = 0 if cache is None else cache.get_seq_length(self.rule.sizes.layer)
        mask = as_mask(
            given.get("attention_mask"),
            self,
            x.shape[1],
            seen + x.shape[1],
            x.device,
            None,
            None,
            cross=False,
            offset=seen,
        )
        return self.rule.mix(x, mask, cache), None


def flowed(standing: Standing, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float | None) -> Tensor:
    """Outputs of a recurrence in a converted model, [batch, query, heads, value_dim]."""
    assert standing.hidden is not None
    out = standing.flow(standing.heads(query, key, value, standing.hidden, mask, scaling), standing.layer)
    return out.transpose(1, 2).contiguous()


def called(operator: Any) -> Operator:
    """The operator itself, or the one of this name, as `name` or `name:param=value`.

    Raises:
        BadInput: something that can stand in no layer.
    """
    found = registry.make(operator, "replace") if isinstance(operator, str) else operator
    if not isinstance(found, Operator):
        kind = type(found).__name__
        raise BadInput(
            f"{kind} is no rule, recurrence or mixer, so it cannot stand as attention; `foveate list --verb replace`"
        )
    return found


def check_form(operator: Operator, causal: bool) -> None:
    """Raises `BadInput` where an operator has no form of the kind that is asked for."""
    name = type(operator).__name__
    if causal and not operator.causal:
        raise BadInput(f"{name} has no causal form: every token sees all others; use it with causal=False, in encoders")
    if not causal and not operator.full:
        raise BadInput(f"{name} is causal by its nature; use it with causal=True, in decoders")


def named(operator: Operator) -> dict[str, Any]:
    """An operator as JSON; a class that is not in the registry by its own path."""
    cls = type(operator)
    if registry.where().get(operator.name, ("", ""))[1] == cls.__module__:
        return written(operator)
    return {"class": f"{cls.__module__}.{cls.__qualname__}", "parameters": repr(operator)}


def recalled(found: dict[str, Any]) -> Operator:
    """An operator from JSON.

    Raises:
        BadInput: it is of a class that is not in the registry.
    """
    if "name" not in found:
        raise BadInput(
            f"its attention is {found['class']}, which is not in the registry: open the model without, use "
            "foveate.convert with that class, and load the weights with load_state_dict"
        )
    return called(read(found))


def described(found: dict[str, Any]) -> str:
    """What `named` gave, for a person."""
    values = found["parameters"]
    if "class" in found:
        return str(values)
    return f"{found['name']}({', '.join(f'{k}={v!r}' for k, v in values.items())})"


# ---------------------------------------------------------------- caches


def use_cache(cache: Any, index: int, operator: Operator | None) -> None:
    """Marks a layer of a cache as this operator's; None: plain attention.

    Raises:
        BadInput: it holds what another operator has written.
    """
    made = cache.__dict__.setdefault(MARK, {})
    before = made.get(index)
    if cache.get_seq_length(index) and before != operator:
        raise BadInput(
            f"layer {index} of this cache was made by {before or 'plain attention'} and cannot be read by "
            f"{operator or 'plain attention'}; start with a new cache"
        )
    made[index] = operator


def state_layer(cache: Any, index: int, operator: Operator) -> StateLayer:
    """The place of a state in a transformers cache, made where there is none.

    Raises:
        BadInput: something else stands there.
    """
    layers, fresh = cache.layers, StateLayer(operator, isinstance(operator, Recurrence))
    while len(layers) <= index:
        layers.append(cache.layer_class_to_replicate() if len(layers) < index else fresh)
    layer = layers[index]
    if not isinstance(layer, StateLayer):
        if layer.get_seq_length():
            raise BadInput(
                f"layer {index} of this cache holds keys and values, which {operator!r} cannot read; start with a "
                f"new one"
            )
        layer = layers[index] = fresh
    if layer.operator != operator:
        raise BadInput(
            f"layer {index} of this cache was made by {layer.operator!r} and cannot be read by {operator!r}; start "
            "with a new cache"
        )
    return layer


def auxiliary_loss(model: torch.nn.Module) -> Tensor:
    """What the rules in a model add to its loss, summed over the layers of the last call in training.

    Reading it forgets it. Zero where no rule has a loss of its own.
    """
    total: Tensor | None = None
    for module in model.modules():
        if isinstance(module, Standing) and module.loss is not None:
            total = module.loss if total is None else total + module.loss
            module.loss = None
    if total is None:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        return torch.zeros((), device=device)
    return total
