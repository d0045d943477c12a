"""Do the heads that find the indirect object also find the colour of an object?

    python bench/claims/circuit_reuse.py --data FOLDER

Heads are found on generated prompts of indirect object identification and of coloured objects: the 16 with the largest
estimates are resample-ablated one by one, those whose interval lies below 0 are the set of the task. Then the set of
each task is ablated on the other one, beside as many random heads of the same layers, and on coloured objects of
BIG-Bench Hard. The paper's wording of coloured objects ("list") is at chance on this model, so heads are found with
another wording ("sentences"), which it solves above chance.
"""

from _claim import number, trained, write
from _tasks import bbh, command, folder
from scipy import stats

from foveate.finding.ablating import Workbench, ablate, ablated_together
from foveate.finding.judging import Judge
from foveate.probe import ColouredObjects, IndirectObject

FOUND, TESTED, COUNT, TOP = 0, 1, 32, 16


def workbench(model, tokenizer, examples):
    return Workbench(Judge(model, tokenizer, examples, batch=16))


def main() -> None:
    data = folder()
    model, tokenizer = trained()
    makers = {"indirect object": IndirectObject(), "coloured objects": ColouredObjects(form="sentences")}
    sets, numbers, control = {}, {}, {}
    for name, make in makers.items():
        found = ablate(workbench(model, tokenizer, make.examples(COUNT, FOUND)), TOP, seed=FOUND)
        sets[name] = found.heads
        numbers[f"{name}: heads"] = [f"L{a}H{h}" for a, h in found.heads]
        for role in ("found", "control"):
            part = found.table[found.table.role == role]
            numbers[f"{name}: mean effect on the margin, {role} (nats)"] = number(part.effect.mean())
        print(name, numbers[f"{name}: heads"], flush=True)
    shared = set(sets["indirect object"]) & set(sets["coloured objects"])
    heads = model.config.num_hidden_layers * model.config.num_attention_heads
    a, b = (len(s) for s in sets.values())
    numbers["heads in both sets"] = len(shared)
    numbers["share of the smaller set"] = number(len(shared) / max(1, min(a, b)))
    # as many drawn at random from all heads
    numbers["p of so many by chance"] = number(stats.hypergeom.sf(len(shared) - 1, heads, a, b)) if a and b else 1.0
    tests = {name: make.examples(COUNT, TESTED) for name, make in makers.items()}
    tests["coloured objects, the paper's wording"] = ColouredObjects().examples(COUNT, TESTED)
    tests["BBH coloured objects"] = bbh(data, "reasoning_about_colored_objects", COUNT, TESTED)
    hurts = {}
    for of, on in (
        ("indirect object", "indirect object"),
        ("indirect object", "coloured objects"),
        ("coloured objects", "indirect object"),
        ("indirect object", "coloured objects, the paper's wording"),
        ("indirect object", "BBH coloured objects"),
    ):
        if not sets[of]:
            continue
        told = ablated_together(workbench(model, tokenizer, tests[on]), sets[of], TESTED)
        for measure in ("right", "margin"):
            numbers[f"{of} heads ablated on {on}, {measure}"] = rounded(told["found"][measure])
            for n, drawn in enumerate(told["controls"]):
                control[f"random heads of the same layers on {on} (for {of}), {measure}, draw {n + 1}"] = rounded(
                    drawn[measure]
                )
        worst = min(c["margin"]["low"] for c in told["controls"])
        hurts[of, on] = told["found"]["margin"]["high"] < 0 and told["found"]["margin"]["difference"] < worst
        print(of, on, told["found"], flush=True)
    carries = hurts.get(("indirect object", "coloured objects"), False)
    overlap = numbers["p of so many by chance"] < 0.01
    write(
        title="Circuit Component Reuse Across Tasks in Transformer Language Models",
        claim="The heads found on indirect object identification are largely those that coloured objects uses: the "
        "sets overlap, and ablating the first set breaks the second task.",
        verdict="holds"
        if carries and overlap and numbers["share of the smaller set"] >= 0.5
        else "partly"
        if carries or overlap
        else "fails",
        numbers=numbers,
        control=control,
        seeds=[FOUND, TESTED],
        rule="carries over: ablating the indirect object's heads lowers the margin on coloured objects (interval below "
        "0) by more than the lower end of every control draw. Holds: that, an overlap with p < 0.01, and half of the "
        "smaller set shared. Partly: one of the first two",
        **command("circuit_reuse"),
    )


def rounded(told):
    return (
        {"value": number(told["difference"])}
        | {k: number(told[k]) for k in ("low", "high", "before", "after", "p")}
        | {"n": told["n"]}
    )


if __name__ == "__main__":
    main()
