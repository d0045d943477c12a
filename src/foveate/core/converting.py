"""Another attention inside a loaded model: `convert`, and what stands on the modules that it changed.

Weights stay where they are. A rule and its parameters become the child `rule` of each attention module, whose
attention function is then ours for good; a mixer takes the module's place. Everything is reached through the modules
themselves, so that a converted model can be copied, saved and trained like any other.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from foveate.core.attach import ACTIVE, attention_layers, is_gone
from foveate.core.calls import call_of, standing_in
from foveate.core.errors import BadInput, NotSupported
from foveate.core.hooks import all_configs
from foveate.core.masking import as_mask, build_mask
from foveate.core.mixer import Mixer
from foveate.core.recurrence import Recurrence
from foveate.core.rows import Layer
from foveate.core.rows import attend as attend_rows
from foveate.core.rule import Operator, Rule, Sizes
from foveate.core.standing import (
    CACHES,
    OTHERS,
    Mixed,
    Standing,
    called,
    check_form,
    flowed,
    named,
    recalled,
    state_layer,
    use_cache,
)

__all__ = ["KEY", "convert", "converted_layers", "register", "restore"]

IMPLEMENTATION = "foveate"
# where the configuration of a model says what stands in which of its layers; saved with it
KEY = "foveate_attention"
# where a module keeps what takes its hooks off
HOOKS = "foveate_hooks"
VALUE_PROJECTIONS = ("v_proj", "value", "v_lin", "v")


def convert(model: PreTrainedModel, rule: Operator | str, layers: int | Iterable[int] | None = None) -> PreTrainedModel:
    """Puts another attention into a loaded model, in place.

    Under a rule or a recurrence all weights stay, and its own parameters come beside them; a mixer takes the place of
    the attention module and its weights. The model can then be run, trained (with peft too), copied, attached to, saved
    with `save_pretrained` and opened with `foveate.load`. A layer can be converted again; `"softmax"` gives a rule
    back.

    Args:
        model: A transformers model whose attention goes through `AttentionInterface`.
        rule: The operator, or its name as `name` or `name:param=value`.
        layers: Numbers of the attention layers, from 0; default: all.

    Returns:
        The model.

    Raises:
        BadInput: no such layer; something is attached; an operator without the form that a layer needs.
        NotOnInterface: the model's attention cannot be reached.
        NotSupported: the rule changes values and the model makes them together with its queries.
    """
    operator = called(rule)
    if model in ACTIVE:
        raise BadInput(
            f"{type(model).__name__} has something attached; leave the `with` block, or take the plan off, and "
            f"convert then"
        )
    known = {layer.index: (module, layer) for module, layer in attention_layers(model).items()}
    wanted = sorted(known) if layers is None else [layers] if isinstance(layers, int) else list(layers)
    if unknown := [n for n in wanted if n not in known]:
        raise BadInput(
            f"{type(model).__name__} has no attention layer {unknown[0]}; it has {len(known)}, from 0 to {max(known)}"
        )
    # everything is tried before anything is changed
    made = []
    for n in wanted:
        module, layer = known[n]
        if is_gone(module):
            raise BadInput(f"the attention of layer {n} has been taken out, so nothing can stand in for it")
        check_form(operator, bool(getattr(module, "is_causal", True)))
        like = next(module.parameters())
        standing = Standing(operator, sizes_of(model, module, n)).to(like.device, like.dtype)
        standing.train(module.training)
        made.append((module, layer, standing, value_projection(module, operator)))
    for module, layer, standing, projection in made:
        clear(module)
        if isinstance(operator, Mixer):
            parent, _, name = layer.name.rpartition(".")
            setattr(model.get_submodule(parent) if parent else model, name, Mixed.of(module, standing))
            continue
        if isinstance(module, Mixed):
            raise BadInput(
                f"layer {layer.index} has {module.rule.operator!r} in the place of its attention, whose weights are "
                "gone; load the model again to give it a rule"
            )
        if isinstance(operator, Rule) and operator.default:
            continue
        module.rule = standing
        module.__dict__[HOOKS] = hooks = [
            module.register_forward_pre_hook(called_with, with_kwargs=True),
            module.register_forward_hook(forgotten),
        ]
        if projection is not None:
            hooks.append(projection.register_forward_hook(partial(written_values, standing)))
    register()
    for config in all_configs(model):
        config._attn_implementation_internal = IMPLEMENTATION
    said = record(model)
    for key, value in ((KEY, said), ("attn_implementation", IMPLEMENTATION)):
        # saved with the weights: transformers alone then refuses to open them, and does not leave out a rule in silence
        if said:
            setattr(model.config, key, value)
        else:
            model.config.__dict__.pop(key, None)
    return model


def register() -> None:
    """Makes the attention function of converted models known to transformers."""
    AttentionInterface.register(IMPLEMENTATION, attention)
    AttentionMaskInterface.register(IMPLEMENTATION, build_mask)


def record(model: PreTrainedModel) -> list[dict[str, Any]]:
    """What stands in which layers, as JSON."""
    found: list[dict[str, Any]] = []
    for n, operator in converted_layers(model).items():
        said = named(operator)
        if found and found[-1]["operator"] == said:
            found[-1]["layers"].append(n)
        else:
            found.append({"operator": said, "layers": [n]})
    return found


def converted_layers(model: PreTrainedModel) -> dict[int, Operator]:
    """The operators that stand in a model's attention layers, by number; plain layers are left out."""
    found = {}
    for module, layer in attention_layers(model).items():
        standing = standing_in(module)
        if standing is not None:
            found[layer.index] = standing.operator
    return found


def restore(model: PreTrainedModel, files: Iterable[Path]) -> list[str]:
    """Converts a fresh model as its configuration says, and reads what its operators learned.

    Args:
        model: The model, with the weights that transformers knows.
        files: The safetensors files that it came from.

    Returns:
        The names of the weights that transformers missed and that the model has no more.

    Raises:
        BadInput: an operator that this version has not; weights of another one.
    """
    said = getattr(model.config, KEY, [])
    before = set(model.state_dict())
    for one in said:
        convert(model, recalled(one["operator"]), one["layers"])
    after = set(model.state_dict())
    wanted = after - before
    found: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name in wanted & set(opened.keys())}
    if lost := sorted(wanted - set(found)):
        raise BadInput(f"the files lack {len(lost)} weights of the model's rules, the first {lost[0]}; save it again")
    model.load_state_dict(found, strict=False)
    return sorted(before - after)


def sizes_of(model: PreTrainedModel, module: torch.nn.Module, number: int) -> Sizes:
    """Sizes of one attention module, from itself or from its configuration.

    Raises:
        NotSupported: they are nowhere to be found.
    """
    if isinstance(module, Mixed):
        return module.rule.sizes
    config = getattr(module, "config", None) or model.config.get_text_config()
    heads = next((n for k in HEADS if isinstance(n := getattr(config, k, None), int)), None)
    width = next((n for k in WIDTHS if isinstance(n := getattr(config, k, None), int)), None)
    if heads is None or width is None:
        raise NotSupported(
            f"{type(module).__name__} does not say how many heads it has, so no rule can be sized for it"
        )
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(module, "head_dim", None) or getattr(config, "head_dim", None) or width // heads
    cached = getattr(module, "layer_idx", None)
    return Sizes(width, heads, kv_heads, head_dim, number if cached is None else cached)


HEADS = ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads")
WIDTHS = ("hidden_size", "n_embd", "d_model")


def value_projection(module: torch.nn.Module, operator: Operator) -> torch.nn.Module | None:
    """The layer that makes the values, for rules that change them.

    Raises:
        NotSupported: the model makes them in one with its queries and keys.
    """
    if not isinstance(operator, Rule) or type(operator).write is Rule.write:
        return None
    for name in VALUE_PROJECTIONS:
        if isinstance(child := getattr(module, name, None), torch.nn.Module):
            return child
    raise NotSupported(
        f"{type(operator).__name__} changes values on their way into the cache, and {type(module).__name__} makes "
        f"them in "
        "one with its queries and keys; models with a value projection of their own work (llama, mistral, qwen, …)"
    )


def clear(module: torch.nn.Module) -> None:
    """Takes a rule off a module again."""
    for handle in module.__dict__.pop(HOOKS, ()):
        handle.remove()
    if standing_in(module) is not None and not isinstance(module, Mixed):
        del module.rule


# ---------------------------------------------------------------- what a running model calls


def called_with(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Notes the input of an attention module, and whose its cache is."""
    standing = standing_in(module)
    if standing is None:
        return
    standing.hidden = args[0] if args else kwargs["hidden_states"]
    cache = next((kwargs[name] for name in CACHES if kwargs.get(name) is not None), None)
    crossing = any(kwargs.get(name) is not None for name in OTHERS)
    recurs = isinstance(standing.operator, Recurrence)
    if recurs and crossing:
        raise NotSupported(
            f"{type(standing.operator).__name__} keeps a state of one sequence and cannot look at another one; leave "
            "cross-attention as it is: foveate.convert(model, rule, layers=...)"
        )
    if cache is not None and recurs:
        standing.layer = state_layer(cache, standing.sizes.layer, standing.operator)
    elif cache is not None and not crossing:
        use_cache(cache, standing.sizes.layer, standing.operator)


def forgotten(module: torch.nn.Module, args: tuple, output: Any) -> None:
    """Lets go of the input of an attention module."""
    if (standing := standing_in(module)) is not None:
        standing.hidden = standing.layer = None


def written_values(standing: Standing, module: torch.nn.Module, args: tuple, output: Tensor) -> Tensor:
    """The values of new tokens as the rule writes them."""
    batch, new, inner = output.shape
    v = output.view(batch, new, -1, inner // standing.sizes.kv_heads).transpose(1, 2)
    v = standing.as_rule.write(standing.learned, v, args[0])
    return v.transpose(1, 2).reshape(batch, new, inner).to(output.dtype)


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What a converted model calls as its attention, in layers with a rule and in those without."""
    mask = as_mask(
        attention_mask, module, query.shape[2], key.shape[2], query.device, is_causal, sliding_window, cross=False
    )
    standing = standing_in(module)
    if standing is not None and isinstance(standing.operator, Recurrence):
        return flowed(standing, query, key, value, mask, scaling), None
    view = call_of(
        module,
        query,
        Layer(getattr(module, "layer_idx", None) or 0, type(module).__name__),
        value_dim=value.shape[3],
        scaling=scaling,
        dropout=dropout,
        softcap=softcap,
        s_aux=s_aux,
        position_bias=position_bias,
    )(key, value, mask)
    rows = attend_rows(view) if standing is None else standing.attend(view)
    return rows.out.transpose(1, 2).contiguous(), None
