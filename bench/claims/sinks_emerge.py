"""Whether sinks and value drains emerge in training with softmax, and not with sigmoid or ReLU.

Bigram-backcopy: behind a trigger the token before it is right, elsewhere the head has nothing to add. Measured on the
head that rests most on the first token: its share of weight there in rows that are no trigger, at triggers, and the
norm of the value there over that of the others. Softmax off by one, which may attend to nothing, is a further control.
"""

from __future__ import annotations

from _claim import mean, write
from _trained import carried_out, command, last, less, runs

from foveate.training.run import Optimisation, Size
from foveate.training.tasks.backcopy import Backcopy

SOFTMAX, OTHERS = "softmax", ("sigmoid", "relu", "key_bias:key=zero")
SIZE = Size(width=64, layers=1, heads=1, feed_forward=4)
TRAINING = Optimisation(steps=2000, batch=32)
# a sink, and no sink, as shares of a row; a value that has drained, as a share of the others' norm
SINK, NONE, DRAINED = 0.5, 0.2, 0.7


def main() -> None:
    found = carried_out(runs(Backcopy(), (SOFTMAX, *OTHERS), SIZE, TRAINING, judged=256, every=200))
    sink = {m: last(o, "sink") for m, o in found.items()}
    drain = {m: last(o, "value_drain") for m, o in found.items()}
    dormant = mean(less(sink[SOFTMAX], last(found[SOFTMAX], "sink_at_triggers")))
    emerges = mean(sink[SOFTMAX])["low"] > SINK and mean(drain[SOFTMAX])["high"] < DRAINED
    absent = {m: mean(sink[m])["high"] < NONE for m in ("sigmoid", "relu")}
    write(
        title="Active-Dormant Attention Heads: Mechanistically Demystifying Extreme-Token Phenomena in LLMs",
        claim="Sinks and value drains emerge in training with softmax, and not with sigmoid or ReLU.",
        verdict="holds"
        if emerges and all(absent.values())
        else "partly"
        if emerges or all(absent.values())
        else "fails",
        numbers={f"share on the first token, {m}": mean(sink[m]) for m in found}
        | {f"norm of the value there over the others', {m}": mean(drain[m]) for m in found}
        | {"share on the first token elsewhere minus at triggers, softmax": dormant},
        control={f"loss at triggers, {m}": mean(last(found[m], "copy_loss")) for m in found}
        | {f"loss above that of the bigrams elsewhere, {m}": mean(last(found[m], "excess")) for m in found},
        rule=f"emerges: with softmax the share lies above {SINK} and the norm below {DRAINED} of the others' "
        f"(intervals). Not "
        f"with the others: the share lies below {NONE} with sigmoid and with ReLU (intervals). Holds: both; partly: "
        f"one",
        encoder="decoders of 1 layer, width 64, 1 head, on bigram-backcopy with the bigrams of Python's documentation",
        **command(),
    )


if __name__ == "__main__":
    main()
