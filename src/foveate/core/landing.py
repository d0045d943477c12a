"""Proof that an edit lands: on a small input it must move what it says, by what its definition predicts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from foveate.core.errors import NotLanded, NotSupported
from foveate.core.mechanism import Edit, ExpertEdit, HeadEdit, Mechanism, Pattern, ResidualEdit, Schedule
from foveate.core.params import bounds_of
from foveate.core.places import Experts, Heads, Indices, Values, Vectors
from foveate.core.rows import View, attend

__all__ = ["Trial", "proved", "small_input"]

TOKENS = 12
# those that may leave everything as it was: a pattern can visit all of a short text, a schedule changes nothing
STILL_KINDS = (Pattern, Schedule)
ACTING = (Edit, HeadEdit, ResidualEdit, ExpertEdit, *STILL_KINDS)
# a share of the largest number there; the reference works in float64
APART = {torch.float32: 1e-3, torch.float64: 1e-6, torch.bfloat16: 0.05, torch.float16: 0.01}
STILL = 1e-7
# the model's own rounding stands between its layers and its output
STILL_OUTPUT = 2e-6


@dataclass(eq=False)
class Trial:
    """What happened in each layer while mechanisms were tried.

    Args:
        moved: How far each mechanism moved each layer, as a share of the largest number there, by its place among them.
        wrong: The first layer whose outputs are not what the reference says, with how far they are off.
        mechanisms: What is tried.
    """

    moved: dict[tuple[int, int], float] = field(default_factory=dict)
    wrong: tuple[int, float] | None = None
    mechanisms: tuple[Mechanism, ...] = ()

    def saw(self, m: Mechanism, layer: int, before: Tensor, after: Tensor) -> None:
        """A mechanism made `after` of `before`."""
        at = next(n for n, one in enumerate(self.mechanisms) if one is m), layer
        self.moved[at] = max(self.moved.get(at, 0.0), apart(before, after))

    @torch.no_grad()
    def called(self, view: View, out: Tensor, mechanisms: Sequence[Mechanism]) -> None:
        """One attention call gave these head outputs; the reference says what they must be, and what moved them."""
        acting = [m for m in mechanisms if isinstance(m, Edit | HeadEdit | Pattern | Schedule)]
        if not acting:
            return
        want = self.reference(view, acting)
        real = view.mask.rows[:, None, :, None]
        off = apart(torch.where(real, want, 0.0), torch.where(real, out.to(want.dtype), 0.0))
        if off > APART.get(view.q.dtype, 1e-3) and self.wrong is None:
            self.wrong = view.layer.index, off
        for m in acting:
            rest = [other for other in acting if other is not m]
            self.saw(m, view.layer.index, self.reference(view, rest), want)

    def reference(self, view: View, mechanisms: Sequence[Mechanism]) -> Tensor:
        """Head outputs by the dense form in float64."""
        patterns = [m.select for m in mechanisms if isinstance(m, Pattern)]
        rows = attend(
            replace(view, dropout=0.0),
            edits=[m for m in mechanisms if isinstance(m, Edit)],
            pattern=patterns[0] if patterns else None,
            engine="reference",
            dtype=torch.float64,
        )
        for m in mechanisms:
            if isinstance(m, HeadEdit):
                rows.out = m.edit(rows, rows.out)
        return rows.out.double()


def apart(a: Tensor, b: Tensor) -> float:
    """Largest difference as a share of the largest number; what is infinite on both sides is equal."""
    a, b = a.double(), b.double()
    gap = torch.where(a == b, 0.0, (a - b).abs()).nan_to_num(torch.inf)
    size = a.abs().nan_to_num(0.0, 0.0, 0.0).max() if a.numel() else a.new_zeros(())
    return float(gap.max() / size.clamp_min(1e-12)) if gap.numel() else 0.0


@torch.no_grad()
def proved(
    model: Any,
    mechanisms: Sequence[Mechanism],
    given: dict[str, Any] | None,
    attached: Callable[[tuple[Mechanism, ...], Trial], AbstractContextManager],
) -> None:
    """Tries what acts on a small input.

    Args:
        model: The model.
        mechanisms: Those that were given; metrics and policies are left out.
        given: The small input, or None: one is made.
        attached: The model with these mechanisms on it, seen by a trial.

    Raises:
        NotLanded: a mechanism changes nothing, or something else than its definition says.
        NotSupported: no small input can be made for this model.
    """
    acting = tuple(m.miniature() if given is None else m for m in mechanisms if isinstance(m, ACTING) and not m.nothing)
    if not acting or all(isinstance(m, Pattern) for m in acting):
        return
    inputs = small_input(model) if given is None else given
    name, modes = type(model).__name__, {m: m.training for m in model.modules()}
    with torch.random.fork_rng(devices=[]):
        model.eval()
        try:
            # also the plain run is one of its own: what is attached around this must not see it
            with attached((), Trial()):
                before = first(model(**inputs))
            trial = Trial(mechanisms=acting)
            with attached(acting, trial):
                after = first(model(**inputs))
        finally:
            for module, training in modes.items():
                module.training = training
    if trial.wrong is not None:
        layer, off = trial.wrong
        raise NotLanded(
            f"{described(acting)} on {name}: the head outputs of layer {layer} are not what the dense reference says "
            f"({off:.2g} of the largest one apart); take another engine, for instance engine='blocks'"
        )
    must_move = [(n, m) for n, m in enumerate(acting) if not isinstance(m, STILL_KINDS)]
    for n, m in must_move:
        moved = {layer for (at, layer), by in trial.moved.items() if at == n and by > STILL}
        still = sorted(named_layers(m) - moved)
        if not moved or still:
            at = f"layer {', '.join(map(str, still))}" if still else "any layer"
            raise NotLanded(
                f"{type(m).__name__} changes nothing in {at} of {name}, tried on a small input: {m!r}. "
                "Check what it names, or give trial={…} with an input that it acts on"
            )
    if must_move and apart(before, after) <= STILL_OUTPUT:
        layers = sorted({layer for (_, layer), by in trial.moved.items() if by > STILL})
        raise NotLanded(
            f"{described(acting)} changes layers {', '.join(map(str, layers))} of {name}, but not the model's output: "
            "what these layers give is not used"
        )


def described(mechanisms: Sequence[Mechanism]) -> str:
    """Their names."""
    return ", ".join(type(m).__name__ for m in mechanisms)


def named_layers(m: Mechanism) -> set[int]:
    """Layers that a mechanism names, of itself or by their heads."""
    found: set[int] = set()
    # a number for a head may be the one that changes nothing
    still = {v for v in (m.identity or {}).values() if isinstance(v, int | float)}
    for name, (_, bounds) in bounds_of(type(m)).items():
        if isinstance(bounds, Heads | Vectors | Experts):
            found |= {layer for layer, *_ in getattr(m, name)}
        elif isinstance(bounds, Values):
            found |= {layer for layer, _, number in getattr(m, name) if number not in still}
        elif isinstance(bounds, Indices) and bounds.what == "layer":
            found |= set(getattr(m, name))
    return found


def first(output: Any) -> Tensor:
    """The first tensor of what a model returns: logits or hidden states."""
    values = output.values() if hasattr(output, "values") else output
    found = next((x for x in values if isinstance(x, Tensor) and x.is_floating_point()), None)
    if found is None:
        raise NotSupported(f"the model returned {type(output).__name__} without a tensor of numbers in it")
    return found


def small_input(model: Any) -> dict[str, Any]:
    """Arguments for one small call: a dozen random tokens, one random image or sound.

    Raises:
        NotSupported: it cannot be told what the model reads.
    """
    rng = torch.Generator().manual_seed(0)
    config, device, dtype = model.config, model.device, model.dtype
    takes = inspect.signature(model.forward).parameters
    made: dict[str, Any] = {}

    def ids(vocabulary: int) -> Tensor:
        return torch.randint(vocabulary // 10, vocabulary, (1, TOKENS), generator=rng).to(device)

    text = config.get_text_config()
    vocabulary = getattr(text, "vocab_size", None)
    if "input_ids" in takes and vocabulary:
        made["input_ids"] = ids(vocabulary)
    if "pixel_values" in takes:
        vision = getattr(config, "vision_config", config)
        size, channels = getattr(vision, "image_size", None), getattr(vision, "num_channels", 3)
        # a model of texts and images reads a text alone; CLIP and its like compare the two
        if size and ("input_ids" not in made or hasattr(config, "projection_dim")):
            wide = size if isinstance(size, list | tuple) else (size, size)
            made["pixel_values"] = torch.randn(1, channels, *wide, generator=rng).to(device, dtype)
    if "input_features" in takes and not made and hasattr(config, "num_mel_bins"):
        frames = 2 * config.max_source_positions
        made["input_features"] = torch.randn(1, config.num_mel_bins, frames, generator=rng).to(device, dtype)
    if "decoder_input_ids" in takes and made and vocabulary:
        made["decoder_input_ids"] = ids(vocabulary)
    if not made:
        raise NotSupported(
            f"no small input for {type(model).__name__} can be made up; give attach(…, trial={{…}}) one, or trial=False"
        )
    return made
