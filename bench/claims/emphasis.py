"""Does emphasis make a model use a fact that stands among others of its kind?

    python bench/claims/emphasis.py

Eight statements of one kind, a question about one of them. The strength is chosen on 60 prompts and judged on 120
others, with the bias on the statement that is asked about, on all heads and on those that responded best; the control
puts the same bias on another statement of the same prompt.
"""

import random

from _claim import trained, write
from _tasks import difference

from foveate.finding.judging import Judge
from foveate.probe import Instruction
from foveate.steer import Emphasis

SEEDS, STRENGTHS, TRAIN, HELD_OUT = (0, 1), (0.5, 1.0, 2.0, 3.0), 60, 120
SPAN = ((0, 1),)


def other(prompt: str, part: str, seed: int) -> str:
    """Another statement of the prompt."""
    lines = [line for line in prompt.split("\n\n")[0].split("\n") if line != part]
    return random.Random(f"{seed} {prompt}").choice(lines)


def main() -> None:
    model, tokenizer = trained()
    training, held_out = Instruction().examples(TRAIN, SEEDS[0]), Instruction().examples(HELD_OUT, SEEDS[1])
    learn = Judge(model, tokenizer, tuple(e.example for e in training), part=tuple(e.part for e in training))
    tried = {s: learn.score(Emphasis(SPAN, s)) for s in STRENGTHS}
    best = max(tried, key=lambda s: (tried[s].accuracy, tried[s].probability.mean()))
    fitted = Emphasis.fit(
        model, tokenizer, [(e.example.prompt, e.example.choices[e.example.answer], e.part) for e in training], best, 40
    )
    examples = tuple(e.example for e in held_out)
    test = Judge(model, tokenizer, examples, part=tuple(e.part for e in held_out))
    wrong = Judge(model, tokenizer, examples, part=tuple(other(e.example.prompt, e.part, SEEDS[1]) for e in held_out))
    plain = test.score()
    found = {
        "all heads": test.score(Emphasis(SPAN, best)),
        f"the {len(fitted.heads)} heads that responded best": test.score(Emphasis(SPAN, best, heads=fitted.heads)),
    }
    numbers = {
        "strength chosen (nats)": best,
        "accuracy by strength, training prompts": {str(s): round(x.accuracy, 3) for s, x in tried.items()},
    }
    for what, scores in found.items():
        numbers[f"right answers, {what}"] = difference(plain.right, scores.right)
        numbers[f"probability of the right answer, {what}"] = difference(plain.probability, scores.probability)
    elsewhere = wrong.score(Emphasis(SPAN, best))
    control = {
        "right answers, another statement emphasised": difference(plain.right, elsewhere.right),
        "probability of the right answer, another statement emphasised": difference(
            plain.probability, elsewhere.probability
        ),
    }
    gain, lost = numbers["right answers, all heads"], control["right answers, another statement emphasised"]
    write(
        title="Emphasis of a span by an additive bias on its scores",
        claim="Emphasis raises the use of the emphasised fact among distractors, and emphasis of another one does not.",
        verdict="holds" if gain["low"] > 0 and lost["high"] < gain["low"] else "partly" if gain["low"] > 0 else "fails",
        numbers=numbers,
        control=control,
        seeds=list(SEEDS),
        rule="holds: the interval of the gain in right answers lies above 0 and above that of the control",
    )


if __name__ == "__main__":
    main()
