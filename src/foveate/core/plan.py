"""Plans: what was decided about a model, saved as JSON, used again on that model only.

A plan names mechanisms with their parameters, the model that they are for, and the evidence that they were chosen on.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from foveate.core.attach import Attached, attach
from foveate.core.errors import BadInput, FoveateError, NothingObserved
from foveate.core.mechanism import Mechanism, PromptEdit, Pruner
from foveate.core.places import Span, placed
from foveate.core.written import read, written

__all__ = ["Applied", "Plan", "apply", "fingerprint"]

FORMAT = "foveate plan 2"
# of the weights, so many numbers of each, evenly spread
SAMPLED = 16
SETTINGS = (
    "attn_logit_softcapping",
    "layer_types",
    "no_rope_layers",
    "partial_rotary_factor",
    "query_pre_attn_scalar",
    "rope_parameters",
    "sliding_window",
)
SIZES = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "vocab_size")
LASTING = "_foveate_applied"
WRITERS = "`foveate steer`, `compress` or `prune`"


@dataclass(frozen=True)
class Plan:
    """Mechanisms for one model.

    Args:
        mechanisms: What acts, in order; prompt edits too.
        model: What tells the model from others, see `fingerprint`.
        evidence: What the mechanisms were chosen on and what they were worth, as JSON.
        part: The words of each prompt that spans are for; "" where they are tokens of one text. Such a plan must be
            put `on` a prompt first.
        index: Which occurrence of these words, from 0, where there are several.
    """

    mechanisms: tuple[Mechanism, ...]
    model: dict[str, Any]
    evidence: dict[str, Any] = field(default_factory=dict)
    part: str = ""
    index: int | None = None

    @classmethod
    def of(
        cls,
        model: Any,
        *mechanisms: Mechanism,
        evidence: dict[str, Any] | None = None,
        name: str = "",
        part: str = "",
        index: int | None = None,
    ) -> Plan:
        """A plan for this model.

        Args:
            model: The model.
            mechanisms: Registered mechanisms, whose parameters are numbers, words and tuples of them.
            evidence: What they were chosen on.
            name: What the user calls the model.
            part: The words of each prompt that spans are for.
            index: Which occurrence of them.

        Raises:
            BadInput: a mechanism that no plan can hold.
        """
        for m in mechanisms:
            written(m)
        return cls(tuple(mechanisms), {"name": name} | fingerprint(model), evidence or {}, part, index)

    def save(self, path: str | Path) -> Path:
        """Writes the plan; what stood at `path` is replaced whole or not at all."""
        path = Path(path)
        text = json.dumps(
            {
                "format": FORMAT,
                "model": self.model,
                "mechanisms": [written(m) for m in self.mechanisms],
                **({"part": self.part, "index": self.index} if self.part else {}),
                "evidence": self.evidence,
            },
            indent=1,
            ensure_ascii=False,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.unfinished")
        unfinished.write_text(text + "\n", encoding="utf-8")
        unfinished.replace(path)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Reads a plan.

        Raises:
            BadInput: there is none, or it is none.
            UnknownName: it names a mechanism that this version has not.
            BadParameter: it has a value outside of its bounds.
        """
        path = Path(path)
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise BadInput(f"no such plan: {path}; {WRITERS} write one") from None
        except IsADirectoryError:
            raise BadInput(f"{path} is a folder; give the plan.json in it") from None
        except ValueError as e:
            raise BadInput(f"{path} is no JSON ({e}); give a plan that {WRITERS} or Plan.save wrote") from None
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            said = found.get("format") if isinstance(found, dict) else None
            raise BadInput(f"{path} is no {FORMAT!r} (its format is {said!r}); write it again with this version")
        try:
            mechanisms = tuple(read(m) for m in found["mechanisms"])
            evidence, part = dict(found.get("evidence", {})), str(found.get("part", ""))
            return cls(mechanisms, dict(found["model"]), evidence, part, found.get("index"))
        except FoveateError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            raise BadInput(f"{path}: a part of the plan is missing or of another form ({e})") from None

    def check(self, model: Any) -> None:
        """Raises `BadInput` unless the plan is for this model."""
        own = fingerprint(model)
        other = [f"{k} {self.model.get(k)!r}, not {v!r}" for k, v in own.items() if self.model.get(k) != v]
        if other:
            raise BadInput(
                f"this plan is for {self.model.get('name') or 'another model'} ({'; '.join(other[:3])}); "
                f"find one for this model with {WRITERS}"
            )

    def prompt(self, text: str) -> str:
        """The text as the plan's prompt edits leave it."""
        for m in self.mechanisms:
            if isinstance(m, PromptEdit):
                text = m.edit(text)
        return text

    def on(self, span: tuple[Span, ...]) -> Plan:
        """The plan for one prompt or a batch of them, its spans on these tokens, as `foveate.locate` gives them."""
        return replace(self, mechanisms=tuple(placed(m, span) for m in self.mechanisms), part="", index=None)

    def attach(self, model: Any, trial: dict[str, Any] | bool = True) -> AbstractContextManager[Attached]:
        """The plan's mechanisms on its model, for the length of a `with` block; prompt edits are left to `prompt`.

        Raises:
            BadInput: the plan is for another model, or for words of a prompt and not yet on one.
        """
        self.check(model)
        if self.part:
            raise BadInput(
                f"this plan acts on the words {self.part!r} of each prompt: put it on yours first, "
                "plan.on(foveate.locate(tokenizer, text, plan.part, plan.index))"
            )
        return attach(model, *(m for m in self.mechanisms if not isinstance(m, PromptEdit)), trial=trial)


@torch.no_grad()
def fingerprint(model: Any) -> dict[str, Any]:
    """What tells a model from others: its kind, its sizes, and digests of how it attends and of all its weights.

    A few numbers of every weight are compared, as bfloat16, so that the precision in which a model was loaded makes no
    difference.
    """
    config = model.config.get_text_config()
    sizes = {k: getattr(config, k, None) for k in SIZES}
    weights, settings = hashlib.sha256(), hashlib.sha256()
    for p in model.parameters():
        some = p.detach().flatten()[:: max(1, p.numel() // SAMPLED)]
        weights.update(some.to("cpu", torch.bfloat16).float().numpy().tobytes())
    settings.update(json.dumps([getattr(config, k, None) for k in SETTINGS], sort_keys=True, default=str).encode())
    kind = getattr(model.config, "model_type", type(model).__name__)
    return (
        {"kind": kind}
        | {k: v for k, v in sizes.items() if v is not None}
        | {"attention": settings.hexdigest()[:16], "weights": weights.hexdigest()[:16]}
    )


# ---------------------------------------------------------------- for good


@dataclass(eq=False)
class Applied:
    """A plan that stays on a model until it is removed.

    Args:
        plan: The plan.
        model: The model that it is on.
        attached: What is attached.
        stack: What takes it off again.
    """

    plan: Plan
    model: Any
    attached: Attached
    stack: ExitStack

    def remove(self) -> None:
        """Takes the plan off; the model computes bit for bit what it did before.

        Raises:
            BadInput: parts of the model are gone, so that it cannot; the plan stays on as it is.
        """
        if self.attached.removal is not None:
            pruners = ", ".join(type(m).__name__ for m in self.plan.mechanisms if isinstance(m, Pruner))
            raise BadInput(
                f"the parts that {pruners} took out of {type(self.model).__name__} are gone, so this plan cannot be "
                "taken off; load the model again"
            )
        # taken off before, the model may have another plan by now
        if self.model.__dict__.get(LASTING) is self:
            del self.model.__dict__[LASTING]
        # a plan may be taken off unused
        with suppress(NothingObserved):
            self.stack.close()


def apply(model: Any, plan: Plan | str | Path) -> Applied:
    """Makes a plan lasting: it acts on every call of the model until `remove` of what comes back.

    Parts that a pruner takes out are gone for good, and the memory of their weights is free. Prompt edits change
    texts, not the model: pass your prompts through `plan.prompt`.

    Args:
        model: The model that the plan is for.
        plan: A plan, or the file that holds one.

    Raises:
        BadInput: the plan is for another model, or this model has one already.
        NotLanded: a mechanism of the plan changes nothing on this model.
    """
    plan = plan if isinstance(plan, Plan) else Plan.load(plan)
    if LASTING in model.__dict__:
        raise BadInput(
            f"{type(model).__name__} has a plan already; take it off with .remove() of what foveate.apply returned"
        )
    stack = ExitStack()
    applied = Applied(plan, model, stack.enter_context(plan.attach(model)), stack)
    if applied.attached.removal is not None:
        applied.attached.removal.release()
    # on the model itself, so that it lives as long as the model
    model.__dict__[LASTING] = applied
    return applied
