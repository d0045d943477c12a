"""Whether three quarters of the heads, chosen by each token, match all of them.

Eight heads of 12 dimensions; a token uses six, of which four are shared and two chosen. Controls: softmax with six
heads of the same width that are always on, and softmax with all eight.
"""

from __future__ import annotations

from dataclasses import replace

from _claim import mean, number, write
from _trained import SIZE, carried_out, characters, command, last, less, runs

LENGTH = 128
SOFTMAX, ROUTED = "softmax", "mixture_of_heads:active=0.75"
EIGHT = replace(SIZE, heads=8)
# nats per character that count as a match
NEAR = 0.02


def main() -> None:
    task = characters(LENGTH, 1)
    found = carried_out(runs(task, (SOFTMAX, ROUTED), EIGHT))
    fewer = carried_out(runs(task, (SOFTMAX,), replace(SIZE, width=72, heads=6)), "-fewer")
    loss = {m: last(o, "loss", LENGTH) for m, o in found.items()}
    gap = mean(less(loss[ROUTED], loss[SOFTMAX]))
    write(
        title="MoH: Multi-Head Attention as Mixture-of-Head Attention",
        claim="With 75 % of the heads, chosen token by token, a model is as good as with all of them.",
        verdict="holds" if gap["high"] <= NEAR else "partly" if gap["value"] <= NEAR else "fails",
        numbers={"loss with routed heads minus that with all": gap, "a match is up to": number(NEAR)},
        control={
            "loss with all eight heads": mean(loss[SOFTMAX]),
            "loss of a narrower model with six heads minus that with all": mean(
                less(last(fewer[SOFTMAX], "loss", LENGTH), loss[SOFTMAX])
            ),
        },
        rule=f"holds: the interval of the difference ends at or below {NEAR} nats per character; partly: its mean does",
        encoder="decoders of 2 layers, width 96, 8 heads, trained on characters of WikiText-2",
        **command(),
    )


if __name__ == "__main__":
    main()
