r"""Expert switching: tunable experts, found by what two kinds of prompts are sent to.

    off: z'_e = -inf        on: z'_e = max(z_e, strength + max_{j not on} z_j)

z are the logits of a router for one token. The model chooses its experts from them, and weighs them, as always.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.attach import Attached, attention_layers
from foveate.core.card import Card, Needs
from foveate.core.errors import BadInput, BadParameter, NotSupported
from foveate.core.hooks import all_configs
from foveate.core.mechanism import ExpertEdit
from foveate.core.params import bounded, check_bounds
from foveate.core.places import some_experts
from foveate.core.recording import router_logits
from foveate.steer._texts import encoded

__all__ = ["ExpertSwitch", "choice_rates"]

Expert = tuple[int, int]
# how configurations call the number of experts that a token goes to
PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k_experts")


@dataclass(frozen=True)
class ExpertSwitch(ExpertEdit):
    """Switches experts of a mixture of experts off, so that no token goes to them, or on, so that every token does.

    Args:
        off: (layer, expert) for each expert that is switched off.
        on: (layer, expert) for each expert that is switched on.
        strength: Nats by which an expert that is on leads those that are neither on nor off; more gives it more of the
            weight.

    Raises:
        BadParameter: an expert is to be on and off.
        BadInput: when it acts, for an expert that the layer has not, or when none of its experts is left as it is.

    Example:
        Which share of the tokens goes to each of four experts, two for each token.

        >>> import foveate
        >>> from foveate.steer.expert_switch import ExpertSwitch, choice_rates
        >>> from foveate.testing import tiny
        >>> model, tokenizer = tiny.model("mixtral"), tiny.tokenizer()
        >>> texts = ["to be or not to be"]
        >>> rates = choice_rates(model, tokenizer, texts)[1].tolist()
        >>> [round(rate, 1) for rate in rates]
        [0.7, 0.3, 0.4, 0.6]
        >>> with foveate.attach(model, ExpertSwitch(off=((1, 2),), on=((1, 3),))):
        ...     rates = choice_rates(model, tokenizer, texts)[1].tolist()
        >>> [round(rate, 1) for rate in rates]
        [0.8, 0.2, 0.0, 1.0]
    """

    off: tuple[Expert, ...] = some_experts()
    on: tuple[Expert, ...] = some_experts()
    strength: float = bounded(1.0, 0.0, 100.0, grid=(0.0, 0.5, 1.0, 2.0, 4.0))

    card: ClassVar = Card(
        title="Mixture of Tunable Experts -- Behavior Modification of DeepSeek-R1 at Inference Time",
        year=2025,
        family="experts",
        needs=Needs.MODEL,
        equation="off: z'_e = -inf; on: z'_e = max(z_e, strength + max_{j not on} z_j)",
        differs="acts on the logits of the router, so that the next best expert takes the place of one that is off; in "
        "the paper, as others describe it, its place stays empty and the weights of the rest are made to sum to one. "
        "How strongly the paper forces experts on is not known to us. `fit` counts how often an expert is chosen; the "
        "paper adds up activations over the tokens of a prompt",
        use="to weaken or force a behaviour that two sets of prompts tell apart, in a mixture of experts",
        misleads="an expert that answers to a topic of the prompts looks like one that makes the behaviour: compare "
        "with `random` experts of the same layers, and test on prompts that `fit` has not seen. Routers that add a "
        "bias to their scores after the logits may still choose an expert that is off, and give it no weight",
    )
    identity: ClassVar = {"off": (), "on": ()}
    test_params: ClassVar = (
        {"off": ((1, 2),)},
        {},
        {"on": ((0, 1),)},
        {"off": ((0, 0), (1, 3)), "on": ((0, 3), (1, 1)), "strength": 3.0},
    )

    def __post_init__(self) -> None:
        check_bounds(self)
        for layer, expert in sorted({*self.off} & {*self.on}):
            raise BadParameter(f"ExpertSwitch: expert {expert} of layer {layer} is to be off and on; name it once")

    def edit(self, layer: int, logits: Float[Tensor, "tokens experts"]) -> Float[Tensor, "tokens experts"]:
        off, on = ([e for at, e in named if at == layer] for named in (self.off, self.on))
        if not off and not on:
            return logits
        count = logits.shape[-1]
        if max(off + on) >= count:
            raise BadInput(
                f"ExpertSwitch: layer {layer} has no expert {max(off + on)}; its {count} experts are 0 to {count - 1}"
            )
        if len(off + on) == count:
            raise BadInput(
                f"ExpertSwitch: all {count} experts of layer {layer} are switched; leave at least one as it is"
            )
        z = logits.index_fill(-1, torch.tensor(off, dtype=torch.long, device=logits.device), -torch.inf)
        if on:
            forced = torch.zeros(count, dtype=torch.bool, device=logits.device)
            forced[on] = True
            lead = self.strength + z.masked_fill(forced, -torch.inf).amax(-1, keepdim=True)
            z = torch.where(forced, torch.maximum(z, lead), z)
        return z

    def sets(self) -> frozenset[tuple]:
        return frozenset(("layer", layer, "expert", expert) for layer, expert in (*self.off, *self.on))

    def miniature(self) -> ExpertSwitch:
        # a dozen tokens may miss an expert that is off; that it can be switched shows in switching it on
        return ExpertSwitch((), (*self.on, *self.off), max(self.strength, 1.0))

    @classmethod
    def fit(
        cls,
        model: Any,
        tokenizer: Any,
        prompts_with: Sequence[str],
        prompts_without: Sequence[str],
        count: int = 10,
        *,
        switch: Literal["off", "on"] = "off",
    ) -> ExpertSwitch:
        """The experts that prompts with something are sent to more often than prompts without it.

        Args:
            model: A mixture of experts.
            tokenizer: Its tokenizer.
            prompts_with: Prompts that bring about a behaviour.
            prompts_without: Prompts that do not, alike in all else.
            count: How many experts, over all layers. In no layer so many that the model could not choose as many
                experts as it wants to.
            switch: What to do with them.

        Raises:
            BadInput: no prompts, or fewer experts than that tell the two kinds apart.
            NotSupported: the model is no mixture of experts.
        """
        sides = (("prompts_with", prompts_with), ("prompts_without", prompts_without))
        a, b = (choice_rates(model, tokenizer, prompts, what=what) for what, prompts in sides)
        contrast = {(layer, e): float(d) for layer in a for e, d in enumerate(a[layer] - b[layer])}
        chosen: list[Expert] = []
        for layer, e in sorted(contrast, key=lambda at: -contrast[at]):
            most = per_token(model) if switch == "on" else len(a[layer]) - per_token(model)
            if contrast[layer, e] > 0 and len(chosen) < count and sum(at == layer for at, _ in chosen) < most:
                chosen.append((layer, e))
        if len(chosen) < max(count, 1):
            raise BadInput(
                f"ExpertSwitch.fit(count={count}): {len(chosen)} experts of {type(model).__name__} are chosen more "
                "often for prompts_with than for prompts_without; ask for at least 1 and at most that many, or give "
                "more prompts"
            )
        found = tuple(sorted(chosen))
        return cls(off=found) if switch == "off" else cls(on=found)

    def random(self, model: Any, seed: int) -> ExpertSwitch:
        """As many other experts of the same layers, drawn at random: the control.

        Args:
            model: The model that this one is for.
            seed: Of the drawing.

        Raises:
            BadInput: a layer has fewer other experts than that.
            NotSupported: the model is no mixture of experts.
        """
        rng, counts = torch.Generator().manual_seed(seed), experts(model)
        off: list[Expert] = []
        on: list[Expert] = []
        for layer in sorted({at for at, _ in (*self.off, *self.on)}):
            named = [e for at, e in (*self.off, *self.on) if at == layer]
            others = [e for e in range(counts.get(layer, 0)) if e not in named]
            if len(others) < len(named):
                raise BadInput(
                    f"ExpertSwitch.random: layer {layer} of {type(model).__name__} has {len(others)} other experts to "
                    f"draw {len(named)} from; name fewer of them"
                )
            picked = [others[n] for n in torch.randperm(len(others), generator=rng).tolist()]
            for drawn, given in ((off, self.off), (on, self.on)):
                drawn += [(layer, picked.pop()) for at, _ in given if at == layer]
        return replace(self, off=tuple(sorted(off)), on=tuple(sorted(on)))


def choice_rates(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, what: str = "prompts"
) -> dict[int, Float[Tensor, " experts"]]:
    """The share of tokens that go to each expert, by layer; the mean over prompts.

    Args:
        model: A mixture of experts.
        tokenizer: Its tokenizer.
        prompts: The prompts.
        what: What they are called in messages.

    Raises:
        BadInput: no prompts.
        NotSupported: the model is no mixture of experts.
    """
    k, found = per_token(model), {layer: torch.zeros(count) for layer, count in experts(model).items()}
    for inputs in encoded(model, tokenizer, prompts, what):
        for layer, logits in router_logits(model, **inputs).items():
            top = torch.zeros_like(logits, dtype=torch.float32).scatter_(-1, logits.topk(k, -1).indices, 1.0)
            found[layer] += top.mean(0).cpu() / len(prompts)
    return found


def experts(model: Any) -> dict[int, int]:
    """How many experts the router of each layer chooses from.

    Raises:
        NotSupported: there are none.
    """
    seen = Attached(model, layers=attention_layers(model))
    counts = {layer: len(router.get_parameter("weight")) for router, layer in seen.routers.items()}
    if not counts:
        raise NotSupported(f"{type(model).__name__} has no experts to switch: it is no mixture of experts")
    return counts


def per_token(model: Any) -> int:
    """How many experts each token goes to.

    Raises:
        NotSupported: the configuration does not say it.
    """
    experts(model)
    for config in all_configs(model):
        for key in PER_TOKEN:
            if isinstance(getattr(config, key, None), int):
                return getattr(config, key)
    raise NotSupported(
        f"the configuration of {type(model).__name__} does not say how many experts a token goes to (none of "
        f"{', '.join(PER_TOKEN)}), so their choice cannot be counted; name the experts"
    )
