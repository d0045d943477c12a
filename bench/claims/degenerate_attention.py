"""Whether the conservation of flow keeps linear attention from becoming a plain mean.

Character models, and how even their rows of weights are on held-out text: exp of a row's entropy over the number of
tokens that it sees, 1 for a plain mean; the rows are those of the second half of a window, the number is a mean over
layers and heads. A weight is what an output takes of a value, competition of sources included, scaled so that each row
sums to 1. Beside flow attention stand linear attention with features elu + 1 and with ReLU, and softmax. Controls are
the same models before training, and the rows of trained flow attention without competition, sigmoid(q) . sigmoid(k).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from _claim import mean, write
from _trained import carried_out, characters, command, home, last, less, runs
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor

from foveate.core.recurrence import Recurrence
from foveate.core.states import run as scanned
from foveate.nn import Attention
from foveate.training.experiment import label
from foveate.training.loop import Training, settled
from foveate.training.model import Decoder
from foveate.training.run import Optimisation, Run, Size

LENGTH, WINDOWS = 64, 32
# positions are added to the tokens, as in the paper: behind a rotation features are none of the content
SIZE = Size(width=64, layers=2, heads=4, feed_forward=4, rope=0.0, places=LENGTH)
TRAINING = Optimisation(steps=800, batch=16)
FLOW, LINEAR, SOFTMAX = "flow", ("elu", "simplified_linear:local=1"), "softmax"
# a row that is more even than this has degenerated
EVEN = 0.8


def main() -> None:
    found = carried_out(runs(characters(LENGTH, 1), (FLOW, *LINEAR, SOFTMAX), SIZE, TRAINING))
    even, top, fresh, bare = {}, {}, {}, []
    for mixer, outcomes in found.items():
        pairs = [evenness(model_of(o.run)) for o in outcomes]
        even[mixer], top[mixer] = ([pair[i] for pair in pairs] for i in (0, 1))
        fresh[mixer] = [evenness(model_of(o.run, trained=False))[0] for o in outcomes]
        if mixer == FLOW:
            bare = [evenness(model_of(o.run), bare=True)[0] for o in outcomes]
    ahead = {m: mean(less(even[m], even[FLOW])) for m in LINEAR}
    degenerate = mean(even[LINEAR[0]])["low"] > EVEN
    less_even = all(a["low"] > 0 for a in ahead.values())
    avoids = less_even and mean(even[FLOW])["high"] < EVEN
    write(
        title="Flowformer: Linearizing Transformers with Conservation Flows",
        claim="Linear attention degenerates to a nearly even mean, and the conservation of flow avoids it.",
        verdict="holds" if degenerate and avoids else "partly" if less_even else "fails",
        numbers={f"evenness of rows, {m}": mean(even[m]) for m in (FLOW, *LINEAR)}
        | {f"evenness of {m} minus that of flow": a for m, a in ahead.items()}
        | {"what competition takes off the evenness of trained flow attention": mean(less(bare, even[FLOW]))},
        control={"evenness of rows, softmax": mean(even[SOFTMAX])}
        | {f"evenness of rows before training, {m}": mean(fresh[m]) for m in found}
        | {f"largest weight of a row, {m}": mean(top[m]) for m in found}
        | {f"held-out loss, {m}": mean(last(o, "loss", LENGTH)) for m, o in found.items()},
        rule=f"degenerate: rows of elu are more even than {EVEN} (interval). Avoided: those of flow are less even than "
        f"{EVEN}, and than those of both linear ones (intervals). Holds: both; partly: flow is less even than both, "
        "whatever they are",
        encoder=f"decoders of {SIZE.layers} layers, width {SIZE.width}, {SIZE.heads} heads, trained on characters of "
        "WikiText-2",
        **command(),
    )


def model_of(run: Run, trained: bool = True) -> Decoder:
    """A model as its training left it, or as it began."""
    with settled(run):
        model = Training(run).model.eval()
    if trained:
        model.load_state_dict(load_file(home() / "runs" / label(run) / "model.safetensors"))
    return model


@torch.no_grad()
def evenness(model: Decoder, bare: bool = False) -> tuple[float, float]:
    """Mean evenness of the rows of a model on held-out windows, and of their largest weights."""
    held = characters(LENGTH, 1).parts()[1]
    ids = held[: WINDOWS * LENGTH].view(WINDOWS, LENGTH)
    states = list(model.stages(ids))
    even, top = [], []
    for n in range(model.size.layers):
        at = next(i for i, (name, _) in enumerate(states) if name == f"layer {n}, attention")
        block = model.layer(n)
        w = rows(block.attention, block.read(states[at - 1][1]), bare)[:, :, LENGTH // 2 :].double()
        total = w.sum(-1, keepdim=True)
        some = total[..., 0] > 0
        p = w / torch.where(total > 0, total, 1.0)
        seen = torch.arange(LENGTH // 2, LENGTH) + 1
        even.append((torch.special.entr(p).sum(-1).exp() / seen)[some].mean())
        top.append(p.amax(-1)[some].mean())
    return torch.stack(even).mean().item(), torch.stack(top).mean().item()


def rows(
    attention: Attention, x: Float[Tensor, "batch time width"], bare: bool
) -> Float[Tensor, "batch heads row time"]:
    """What each output of a layer takes of each value."""
    if attention.rule is None or not isinstance(attention.rule.operator, Recurrence):
        return attention.weights(x)
    heads = attention.heads(x)
    if bare:
        return (heads.q.sigmoid() @ heads.every_head(heads.k).sigmoid().mT).tril()
    # an output of unit vectors is the row of weights that mixes them
    units = torch.eye(x.shape[1]).expand(*heads.v.shape[:2], -1, -1)
    return scanned(attention.rule.operator.scan(replace(heads, v=units)))[0]


if __name__ == "__main__":
    main()
