r"""Based: linear attention by the second-order Taylor series of exp, in turn with sliding windows.

o_i = \sum_j (1 + s_ij + s_ij^2 / 2) v_j / \sum_j (1 + s_ij + s_ij^2 / 2),   s_ij = (W_q q_i) . (W_k k_j) / sqrt(f)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from foveate.core.card import Card, Needs
from foveate.core.errors import NotSupported
from foveate.core.mixer import State
from foveate.core.params import bounded
from foveate.core.recurrence import Heads, Recurrence
from foveate.core.rule import Sizes
from foveate.core.states import Form, Scan
from foveate.replace.linear._taylor import Narrow
from foveate.replace.linear._window import Windows

__all__ = ["Taylor"]


@dataclass(frozen=True)
class Taylor(Recurrence):
    """Linear attention with second-order Taylor features, every second layer a window of softmax where one is set.

    Example:
        A model whose layers are linear and windows of 8 tokens in turn.

        >>> import foveate
        >>> from foveate.replace import Taylor
        >>> from foveate.testing import tiny
        >>> rule = Taylor(feature_dim=4, window=8)
        >>> model = foveate.convert(tiny.model("llama"), rule)
        >>> layers = model.model.layers
        >>> [layer.self_attn.rule.learned is None for layer in layers]
        [False, True]

    Args:
        feature_dim: Width f of a projected query or key; a state has 1 + f + f (f + 1) / 2 rows.
        window: Tokens that a token of layers 1, 3, 5, … sees under softmax, itself included; 0: all layers are linear.
    """

    feature_dim: int = bounded(16, 1, 256)
    window: int = bounded(0, 0, 65536)

    normalised: ClassVar[bool] = True

    card: ClassVar = Card(
        title="Simple linear attention language models balance the recall-throughput tradeoff",
        year=2024,
        family="linear",
        needs=Needs.QUERIES | Needs.KEYS | Needs.VALUES | Needs.TRAINING,
        equation="o_i = sum_j (1 + s_ij + s_ij^2 / 2) v_j / sum_j (1 + s_ij + s_ij^2 / 2), s_ij = W_q q_i . W_k k_j / "
        "sqrt(f)",
        differs="the narrow queries and keys are projections of the layer's own, head by head, positions in them, and "
        "not of its input; each pair of features is kept once, which gives the same products; the gated convolutions "
        "that make up most layers of the authors' models are no attention and are left out; nothing is added to the "
        "sum of the weights; the form where all see all is ours",
        use="to train models with a state of a size that can be chosen, windows for what is near and the state for "
        "the rest",
        misleads="weights grow again where scores are below -1, so that large scores of a loaded model mean nothing "
        "here; at f = 16 a state is as large as a cache of about 80 tokens; the paper's results are of its hybrid",
        claims=("recall_frontier",),
    )
    test_params: ClassVar = ({}, {"feature_dim": 3, "window": 4})

    def slides(self, sizes: Sizes) -> bool:
        """Whether a layer is one with a window."""
        return self.window > 0 and sizes.layer % 2 == 1

    def learned(self, sizes: Sizes) -> nn.Module | None:
        return None if self.slides(sizes) else Narrow(self.feature_dim, sizes)

    def scan(self, heads: Heads, first: bool = True) -> Scan:
        if self.slides(heads.sizes):
            raise NotSupported(f"layer {heads.sizes.layer} is one with a window, which is no scan; look at an even one")
        return super().scan(heads, first)

    def queries(self, heads: Heads) -> Float[Tensor, "batch heads time key"]:
        assert isinstance(heads.learned, Narrow)
        return heads.learned.queries(heads.q)

    def keys(self, heads: Heads) -> Float[Tensor, "batch kv_heads time key"]:
        assert isinstance(heads.learned, Narrow)
        return heads.learned.keys(heads.k)

    def flow(
        self, heads: Heads, state: State | None, form: Form = "auto"
    ) -> tuple[Float[Tensor, "batch heads time value_dim"], State]:
        if not self.slides(heads.sizes):
            return Recurrence.flow(self, heads, state, form)
        windows = Windows.of(heads, self.window, state)
        return windows.back(windows.attend()[0]), windows.state()
