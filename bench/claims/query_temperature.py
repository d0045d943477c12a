"""Whether temperatures of queries and values by token and place improve a language model, for few parameters.

Selective attention against softmax under the same seeds and data, judged at the training length. The control is a
model of softmax that is wider by more parameters than the temperatures have.
"""

from __future__ import annotations

from dataclasses import replace

from _claim import mean, number, write
from _trained import MODEL, SIZE, TRAINING, carried_out, characters, command, last, less, runs

LENGTH = 128
SOFTMAX, SELECTIVE = "softmax", "selective"
FEW = 0.005


def main() -> None:
    task = characters(LENGTH, 1)
    found = carried_out(runs(task, (SOFTMAX, SELECTIVE), training=TRAINING))
    wider = carried_out(runs(task, (SOFTMAX,), replace(SIZE, width=SIZE.width + 8)), "-wider")
    loss = {m: last(o, "loss", LENGTH) for m, o in found.items()}
    size = {m: o[0].result["parameters"] for m, o in found.items()}
    more = size[SELECTIVE] / size[SOFTMAX] - 1
    gain = mean(less(loss[SOFTMAX], loss[SELECTIVE]))
    write(
        title="Selective Attention: Enhancing Transformer through Principled Context Control",
        claim="Query and value temperatures improve the loss of a language model with under 0.5 % more parameters.",
        verdict="holds"
        if gain["low"] > 0 and more < FEW
        else "partly"
        if gain["low"] > 0 or gain["value"] > 0
        else "fails",
        numbers={
            "loss of softmax minus that with temperatures": gain,
            "parameters more, as a share": number(more),
        },
        control={
            "loss of softmax": mean(loss[SOFTMAX]),
            "loss of softmax minus that of a wider one": mean(
                less(loss[SOFTMAX], last(wider[SOFTMAX], "loss", LENGTH))
            ),
            "parameters more of the wider one, as a share": number(
                wider[SOFTMAX][0].result["parameters"] / size[SOFTMAX] - 1
            ),
        },
        rule=f"holds: the interval of the gain lies above 0 and the parameters are under {FEW:.1%} more; partly: it "
        f"does "
        "at more parameters, or only the mean lies above 0",
        encoder=MODEL,
        **command(),
    )


if __name__ == "__main__":
    main()
