"""Those that take parts out of a model."""

from __future__ import annotations

import copy
import weakref
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from foveate.core.attach import attach
from foveate.core.errors import BadInput
from foveate.core.mechanism import Pruner
from foveate.core.plan import Plan, apply
from foveate.core.registry import where
from foveate.testing import tiny
from foveate.testing.checks.measuring import same
from foveate.testing.checks.running import Skip, check, expect
from foveate.testing.checks.steering import declared_identity, generated, logits, padded_as_alone, texts

# where the attention and the feed-forward of a layer put what they say
LAST = {
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "opt": ("self_attn.out_proj", "fc2"),
}
CUTS = (0, 4, *range(5, 12))


@check(Pruner)
def _identity(m: Pruner) -> None:
    """Where it names nothing, it changes nothing."""
    nothing = replace(m, **declared_identity(m))
    for name in some(m):
        model, given = tiny.model(name), texts(name, m)
        same(logits(model, nothing, [given]), logits(model, None, [given]), f"{name}, with nothing taken out", 1e-5)


@check(Pruner)
def silent(m: Pruner) -> None:
    """Without its parts the model gives what it gives when they say nothing."""
    for name in some(m):
        model, given = tiny.model(name), texts(name, m)
        got, want = logits(model, m, [given]), logits(silenced(name, model, m), None, [given])
        same(got, want, f"{name}, against a model whose parts say nothing")


@torch.no_grad()
def silenced(name: str, model: Any, m: Pruner) -> Any:
    """A copy of a tiny model in which the parts have zeros for what they say."""
    made, parts = copy.deepcopy(model), m.parts()
    blocks: Any = next(x for x in made.modules() if isinstance(x, nn.ModuleList))
    for which, layers in enumerate((parts.attention, parts.feed_forward)):
        for layer in layers:
            for p in blocks[layer].get_submodule(LAST[name][which]).parameters():
                p.zero_()
    for layer, head in parts.heads:
        out = blocks[layer].get_submodule(LAST[name][0])
        size = out.weight.shape[1] // made.config.num_attention_heads
        out.weight[:, head * size : (head + 1) * size] = 0
    return made


@check(Pruner)
def restores(m: Pruner) -> None:
    """Afterwards, also after an exception, the model is bit for bit what it was, with the modules that it had."""
    for name in some(m):
        model, given = tiny.model(name), texts(name, m)
        before, modules = logits(model, None, [given]), dict(model.named_modules())
        config, own = copy.deepcopy(model.config.to_dict()), [dict(vars(x)) for x in model.modules()]
        for fails in (False, True):
            try:
                with torch.no_grad(), attach(model, m):
                    model(**given)
                    if fails:
                        raise KeyError
            except KeyError:
                pass
            where_ = f"{name}, after {'an exception' if fails else 'leaving'}"
            same(logits(model, None, [given]), before, where_, 0.0)
            found = dict(model.named_modules())
            expect(found.keys() == modules.keys(), f"{where_}: modules {sorted(found.keys() ^ modules.keys())}")
            expect(all(found[n] is x for n, x in modules.items()), f"{where_}: another module stands in a place")
            expect([{*vars(x)} for x in model.modules()] == [{*o} for o in own], f"{where_}: an attribute is left")
            expect(model.config.to_dict() == config, f"{where_}: the configuration is another one")


@check(Pruner)
def _decode(m: Pruner) -> None:
    """A text decoded token by token with a cache gives what one prefill without a cache gives."""
    for name in some(m):
        model, ids = tiny.model(name), texts(name, m)["input_ids"][:, : CUTS[-1]]
        steps = [{"input_ids": ids[:, a:b]} for a, b in pairwise(CUTS)]
        got, want = logits(model, m, steps), logits(model, m, [{"input_ids": ids}])
        same(got, want, f"{name}, token by token against one prefill")
        tokens = generated(model, m, {"input_ids": ids})["tokens"]
        for n in range(tokens.shape[1]):
            so_far = torch.cat([ids, tokens[:, :n]], 1)
            says = logits(model, m, [{"input_ids": so_far}])["logits"][:, -1].argmax(-1)
            expect(torch.equal(says, tokens[:, n]), f"{name}: `generate` says another token {n} than a prefill")


@check(Pruner)
def _padding(m: Pruner) -> None:
    """A padded row gives what the same row gives alone."""
    padded_as_alone(m, some(m))


@check(Pruner)
def frees(m: Pruner) -> None:
    """Applied with a plan its parts are gone: nobody holds their weights, and the plan cannot be taken off."""
    if m.nothing:
        raise Skip("nothing is taken out at this setting")
    if where().get(m.name, ("", ""))[1] != type(m).__module__:
        raise Skip("only a registered mechanism can be in a plan")
    for name in some(m):
        model, given = tiny.model(name), texts(name, m)
        with attach(model, m, trial=False):
            model(**given)
            left = sum(p.numel() for p in model.parameters())
        want = logits(model, m, [given])
        weights = [weakref.ref(p) for p in model.parameters()]
        applied = apply(model, Plan.of(model, m))
        alive = {id(p()): p() for p in weights if p() is not None}
        own = {id(p) for p in model.parameters()}
        held = sum(p.numel() for at, p in alive.items() if p is not None and at not in own)
        expect(not held, f"{name}: {held} weights are not in the model any more, and somebody holds them")
        count = sum(p.numel() for p in model.parameters())
        expect(count == left, f"{name}: {count} weights are left when applied, {left} when attached")
        same(logits(model, None, [given]), want, f"{name}, applied against attached", 0.0)
        refused(applied.remove, f"{name}: the plan can be taken off, though its parts are gone")
        same(logits(model, None, [given]), want, f"{name}, after trying to take it off", 0.0)


def refused(action: Any, otherwise: str) -> None:
    """Fails unless `BadInput` is raised."""
    try:
        action()
    except BadInput:
        return
    expect(False, otherwise)


def some(m: Pruner) -> tuple[str, ...]:
    """Tiny models that can do without these parts."""
    return ("llama", "opt") if m.parts().heads else ("llama", "gpt2", "opt")
