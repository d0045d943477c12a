"""Greedy removal: of all parts that are left, the one goes without which the output changes least, again and again.

Blocks in front of the one whose part is tried say what they said before, so that a try costs half a run on average.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core.attach import attention_layers
from foveate.core.errors import BadInput, NotSupported
from foveate.core.removing import Branch, Gone, Kind, answer, branches, leave_out

__all__ = ["DISTANCES", "Greedy", "Step", "angle", "divergence", "norm"]

ROWS = 128
Logits = Float[Tensor, "batch query vocabulary"]


def divergence(plain: Logits, pruned: Logits) -> float:
    """Mean Jensen-Shannon divergence of the next-token distributions, in nats: from 0 to ln 2."""
    total = 0.0
    # so many rows at once: a distribution over a large vocabulary is large
    for p, q in zip(plain.flatten(0, 1).split(ROWS), pruned.flatten(0, 1).split(ROWS), strict=True):
        log_p, log_q = p.float().log_softmax(-1), q.float().log_softmax(-1)
        log_m = torch.logaddexp(log_p, log_q) - torch.tensor(2.0).log()
        total += 0.5 * float((log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum())
    return total / plain[..., 0].numel()


def norm(plain: Logits, pruned: Logits) -> float:
    """Mean over the texts of the Frobenius norm of the change of the logits."""
    return float(torch.linalg.matrix_norm(plain.float() - pruned.float()).mean())


def angle(plain: Logits, pruned: Logits) -> float:
    """Mean angle between the logits before and after, in radians; one beyond a right angle counts as one."""
    cosine = torch.cosine_similarity(plain.float(), pruned.float(), dim=-1)
    return float(cosine.clamp(0, 1).acos().mean())


DISTANCES: dict[str, Callable[[Logits, Logits], float]] = {"divergence": divergence, "norm": norm, "angle": angle}


@dataclass(frozen=True)
class Step:
    """What went in one step.

    Args:
        kind: Attention or feed-forward.
        layer: Of which layer.
        distance: How far the output is then from that of the whole model.
        tried: The distance without each part that was left, (kind, layer, distance), in order of layers.
    """

    kind: str
    layer: int
    distance: float
    tried: tuple[tuple[str, int, float], ...] = ()

    @classmethod
    def read(cls, found: dict[str, Any]) -> Step:
        """From JSON, which knows no tuples."""
        return cls(**found | {"tried": tuple(map(tuple, found["tried"]))})


@dataclass(eq=False)
class Greedy:
    """One search on one model and some texts.

    Args:
        model: A causal language model.
        texts: Token ids, each [texts, tokens].
        measure: One of `DISTANCES`.
    """

    model: Any
    texts: Sequence[Tensor]
    measure: str

    def __post_init__(self) -> None:
        if getattr(self.model.config, "is_encoder_decoder", False):
            raise NotSupported(
                f"{type(self.model).__name__} is an encoder with a decoder, whose parts cannot be taken out; take a "
                "decoder alone"
            )
        self.layers = {module: layer.index for module, layer in attention_layers(self.model).items()}
        self.found, _ = branches(self.model, self.layers, {"input_ids": self.texts[0][:1]})

    def left(self, among: Sequence[str], first: int) -> list[Branch]:
        """The parts that may go, in order of layers.

        Raises:
            NotSupported: the model has none of a kind that can be taken out.
        """
        for kind in among:
            if not any(k == kind for k, _ in self.found):
                raise NotSupported(
                    f"{type(self.model).__name__} has no {kind.replace('_', '-')} that can be told from the rest of a "
                    "layer; llama, mistral, qwen, gemma, phi, mixtral, gpt2, opt and their like work"
                )
        return sorted((b for (k, n), b in self.found.items() if k in among and n >= first), key=order)

    @torch.no_grad()
    def steps(
        self,
        count: int,
        left: list[Branch],
        tick: Callable[[], None],
        done: Sequence[Step] = (),
        keep: Callable[[int, Step], None] | None = None,
    ) -> tuple[Step, ...]:
        """Takes out part after part; the model comes out as it went in.

        Args:
            count: How many go.
            left: The parts that may go.
            tick: Called after each try.
            done: The first steps, where an earlier search on the same model and texts found them.
            keep: Called with the number of a step, from 0, and the step, as soon as it is found.
        """
        found = list(done)
        with ExitStack() as back, evaluating(self.model):
            plain = [self.logits(ids) for ids in self.texts]
            by_name: dict[tuple[str, int], Branch] = {(b.kind, b.layer): b for b in left}
            for step in done:
                leave_out(back, gone := by_name[step.kind, step.layer])
                left = [b for b in left if b is not gone]
            for n in range(len(done), count):
                tried = self.distances(self.allowed(left), plain, tick)
                best = min(tried, key=lambda branch: tried[branch])
                leave_out(back, best)
                left = [b for b in left if b is not best]
                told = tuple((b.kind, b.layer, d) for b, d in tried.items())
                found.append(Step(best.kind, best.layer, tried[best], told))
                if keep is not None:
                    keep(n, found[-1])
        return tuple(found)

    def distances(self, left: list[Branch], plain: list[Tensor], tick: Callable[[], None]) -> dict[Branch, float]:
        """How far the output is from the plain one without each of these parts, beside what is gone already."""
        total = dict.fromkeys(left, 0.0)
        compare, texts = DISTANCES[self.measure], sum(len(ids) for ids in self.texts)
        for ids, before in zip(self.texts, plain, strict=True):
            said = self.said_by_blocks(ids)
            for branch in left:
                with ExitStack() as back:
                    for block, made in said.items():
                        if block is branch.block:
                            break
                        answer(back, block, lambda *_, made=made, **__: made)
                    leave_out(back, branch)
                    total[branch] += compare(before, self.logits(ids)) * len(ids) / texts
                    tick()
        return total

    def said_by_blocks(self, ids: Tensor) -> dict[nn.Module, Any]:
        """What each block gives, in the order in which they are called."""
        said: dict[nn.Module, Any] = {}
        with ExitStack() as back:
            for block in {b.block for b in self.found.values()}:
                answer(back, block, Kept(said, block))
            self.model.base_model(input_ids=ids, use_cache=False)
        return said

    def allowed(self, left: list[Branch]) -> list[Branch]:
        """Without the last attention."""
        gone = sum(isinstance(getattr(b.block, name), Gone) for b in self.attention for name, _ in b.stands)
        return [b for b in left if b.kind != "attention" or gone < len(self.attention) - 1]

    @property
    def attention(self) -> list[Branch]:
        """The attention parts of the model as it came."""
        return [b for (kind, _), b in self.found.items() if kind == "attention"]

    def logits(self, ids: Tensor) -> Logits:
        """What the model says of a text.

        Raises:
            NotSupported: it has no logits.
        """
        made = getattr(self.model(input_ids=ids, use_cache=False), "logits", None)
        if not isinstance(made, Tensor) or made.ndim != 3:
            raise NotSupported(f"{type(self.model).__name__} gives no logits for tokens; load a causal language model")
        return made


class Kept:
    """A block's own forward, which notes what it gave."""

    def __init__(self, said: dict[nn.Module, Any], block: nn.Module):
        self.said, self.block, self.plain = said, block, block.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.block in self.said:
            raise NotSupported(f"{type(self.block).__name__} is several layers in one, and has no parts of its own")
        made = self.said[self.block] = self.plain(*args, **kwargs)
        return made


def order(branch: Branch) -> tuple[int, Kind]:
    """Layer by layer, attention first."""
    return branch.layer, branch.kind


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode."""
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def pieces(ids: Tensor | Sequence[Tensor], model: Any) -> list[Tensor]:
    """Token ids as they were given, one call each.

    Raises:
        BadInput: something that is no token ids.
    """
    found = [ids] if isinstance(ids, Tensor) else list(ids)
    found = [one[None] if isinstance(one, Tensor) and one.ndim == 1 else one for one in found]
    if not found or any(
        not isinstance(one, Tensor) or one.ndim != 2 or one.is_floating_point() or one.numel() == 0 for one in found
    ):
        got = [tuple(one.shape) if isinstance(one, Tensor) else type(one).__name__ for one in found]
        raise BadInput(
            f"calibration texts must be token ids, [texts, tokens] without padding, one or several; got {got}"
        )
    return [one.to(model.device) for one in found]
