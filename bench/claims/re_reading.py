"""Does asking a question twice help a small model?

    python bench/claims/re_reading.py --data FOLDER

Three tasks of BIG-Bench Hard and two of generated prompts, choices compared by log-likelihood. The control repeats
another question of the same task instead of this one: the prompt is as long, and nothing is read again.
"""

from dataclasses import replace

import numpy as np
from _claim import trained, write
from _tasks import bbh, command, difference, folder

from foveate.finding.judging import Judge
from foveate.probe import Arithmetic, ColouredObjects
from foveate.steer import Reread

SEED, COUNT = 0, 60
FILES = ("reasoning_about_colored_objects", "hyperbaton", "sports_understanding")


def main() -> None:
    data = folder()
    model, tokenizer = trained()
    tasks = {f"BBH {name}": bbh(data, name, COUNT, SEED) for name in FILES}
    tasks |= {
        "arithmetic": Arithmetic().examples(COUNT, SEED),
        "coloured objects": ColouredObjects().examples(COUNT, SEED),
    }
    numbers, control, before, after = {}, {}, [], []
    for name, examples in tasks.items():
        judge = Judge(model, tokenizer, examples)
        plain, twice = judge.score(), judge.score(Reread())
        # the same words in front, about another question
        shifted = [examples[(n + 1) % len(examples)].prompt for n in range(len(examples))]
        mixed = [Reread().edit(e.prompt).replace(e.prompt, o, 1) for e, o in zip(examples, shifted, strict=True)]
        mixed = tuple(replace(e, prompt=p) for e, p in zip(examples, mixed, strict=True))
        other = Judge(model, tokenizer, mixed).score()
        numbers[name] = difference(plain.right, twice.right)
        control[f"{name}: another question in front"] = difference(plain.right, other.right)
        before.append(plain.right)
        after.append(twice.right)
        print(name, numbers[name], control[f"{name}: another question in front"], flush=True)
    pooled = numbers["all tasks"] = difference(np.concatenate(before), np.concatenate(after))
    better = sum(v["low"] > 0 for k, v in numbers.items() if k != "all tasks")
    write(
        title="Re-Reading Improves Reasoning in Language Models",
        claim="Reading the question twice improves answers across reasoning tasks.",
        verdict="holds" if pooled["low"] > 0 and better > 1 else "partly" if pooled["low"] > 0 or better else "fails",
        numbers=numbers,
        control=control,
        seeds=[SEED],
        rule="holds: the pooled interval lies above 0, and so do those of two tasks or more",
        **command("re_reading"),
    )


if __name__ == "__main__":
    main()
