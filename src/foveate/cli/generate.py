"""`foveate generate`: continue a text under a plan or with a compressed KV cache, and say what that saves.

With `--continuations` many texts are continued that share a prompt, which is read and held once.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foveate.core.errors import BadInput

if TYPE_CHECKING:
    from foveate.core.budget import Amount
    from foveate.core.plan import Plan


def command(
    model: Annotated[str, typer.Argument(help="smollm2 (embedded), a folder, a .gguf file or a hub id.")],
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="A KV policy by name, parameters as observation_window:window=16. Again for another one beside it, "
            "one that stores or merges what the first keeps, say. Default: none."
        ),
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(help="A plan for this model, as `foveate steer` and `foveate compress` write it. Default: none."),
    ] = None,
    keep: Annotated[str, typer.Option(help="A share (0.25), tokens per head (512) or bytes (200MB).")] = "0.25",
    text: Annotated[
        list[Path] | None, typer.Option(help="Text files, joined in order; default: a passkey hidden in 1,024 tokens.")
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(help="What to say after the text; with --continuations, the file of the prompt that they share."),
    ] = None,
    continuations: Annotated[
        Path | None,
        typer.Option(
            help='A file with what follows the prompt, one text per line, or JSON lines {"text": …}; each is continued.'
        ),
    ] = None,
    batch: Annotated[int, typer.Option(help="Most continuations at a time.")] = 32,
    tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print answer and figures as JSON, nothing else.")] = False,
) -> None:
    """Continue a text greedily, or many that share a prompt, and tell tokens per second and bytes of the cache."""
    from rich.console import Console

    from foveate.cli.profile import read_texts

    if tokens < 1:
        raise BadInput(f"--tokens {tokens}: at least 1 token must be generated")
    screen = Console(stderr=as_json, highlight=False)
    given = read_texts(text) if text else None
    if continuations is not None:
        if policy or plan:
            option = "--policy" if policy else "--plan"
            raise BadInput(
                f"{option} beside --continuations: a prompt that is shared is kept whole; leave one of them out"
            )
        if prompt is None:
            raise BadInput("--continuations needs the prompt that they share; give its file with --prompt FILE")
        if batch < 1:
            raise BadInput(f"--batch {batch}: at least 1 continuation must be made at a time")
        shared = "\n\n".join(part for part in (given, read(Path(prompt), "--prompt")) if part)
        continue_all(model, shared, read_lines(continuations), (batch, tokens), screen, as_json)
        return
    amount = budget(keep)
    policy = policy or []
    for one in policy:
        named(one)
    with screen.status(f"opening {model} …"):
        from foveate.core.mechanism import Policy
        from foveate.core.plan import Plan
        from foveate.core.policy import Policies
        from foveate.core.registry import make
        from foveate.models import load

        planned = None if plan is None else Plan.load(plan)

        # a policy that cannot be is told before a model is opened
        chosen: list[Any] = [make(one, "compress") for one in policy]
        chosen = [one.within(amount) if one.parts & {"score", "read"} else one for one in chosen]
        Policies.of(chosen)
        network, tokenizer = load(model)
        if planned is not None:
            planned.check(network)
    ids, planned = prompt_ids(network, tokenizer, given, prompt, tokens, planned)
    kept = " and ".join(policy) or "the whole cache (--policy for less)"
    if any(one.parts & {"score", "read"} for one in chosen):
        kept += f", keeping {keep}"
    if planned is not None and any(isinstance(m, Policy) for m in planned.mechanisms):
        kept = f"{' and '.join(policy)} beside what the plan keeps" if policy else "the cache that the plan keeps"
    steered = "" if planned is None else f", under {', '.join(type(m).__name__ for m in planned.mechanisms)}"
    screen.print(f"{model}: a prompt of {ids.shape[1]:,} tokens, {kept}{steered}\n")
    out = None if as_json else sys.stdout
    with nullcontext() if planned is None else planned.attach(network) as whole:
        figures = generate(network, tokenizer, ids, chosen, tokens, out, whole)
    if as_json:
        json.dump(figures, sys.stdout, indent=2)
        print()
        return
    share = figures["bytes_held"] / figures["bytes_full"]
    screen.print(
        f"\n[dim]{figures['tokens']} tokens, {figures['tokens_per_second']:.1f} per second after "
        f"{figures['seconds_to_first_token']:.1f} s to the first; KV cache {figures['bytes_held'] / 1e6:.1f} MB, "
        f"{share:.0%} of the full {figures['bytes_full'] / 1e6:.1f} MB[/]"
    )


def budget(keep: str) -> Amount:
    """What `--keep` says, checked as a budget is."""
    from foveate.core.budget import Budget

    try:
        amount: Amount = float(keep) if "." in keep else int(keep)
    except ValueError:
        amount = keep
    Budget.of(amount)
    return amount


def named(policy: str) -> None:
    """A misspelt policy, or a mechanism that is none, is told before a model is opened."""
    from foveate.catalogue import entries
    from foveate.core.errors import unknown

    known = {e["name"] for e in entries() if e["kind"] == "Policy"}
    if policy.partition(":")[0] not in known:
        raise unknown("KV policy", policy.partition(":")[0], known, "See `foveate list --kind Policy`.")


def prompt_ids(
    model: Any, tokenizer: Any, text: str | None, prompt: str | None, tokens: int, plan: Plan | None = None
) -> tuple[Any, Plan | None]:
    """Token ids of what the model is to continue, a chat model asked as its template says; and the plan put on it."""
    import torch

    from foveate.locating import locate
    from foveate.profiling import positions

    if text is None and prompt is None:
        from foveate.probe import Passkey

        ids = list(Passkey(1024).samples(tokenizer, 1)[0].ids)
        if plan is not None and plan.part:
            raise BadInput(f"the plan acts on the words {plan.part!r} of a prompt; give one with --prompt or --text")
    else:
        content = "\n\n".join(part for part in (text, prompt) if part)
        content = content if plan is None else plan.prompt(content)
        special = not getattr(tokenizer, "chat_template", None)
        if not special:
            turn = [{"role": "user", "content": content}]
            content = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(content, add_special_tokens=special, verbose=False)["input_ids"]
        if plan is not None and plan.part:
            plan = plan.on(locate(tokenizer, content, plan.part, plan.index, add_special_tokens=special))
    limit = positions(model)
    if not ids:
        raise BadInput("there is nothing to continue; give --text FILE or --prompt TEXT")
    if limit is not None and len(ids) + tokens > limit:
        raise BadInput(
            f"a prompt of {len(ids):,} tokens and {tokens} more do not fit in the model's {limit:,} positions; "
            "give a shorter text or fewer --tokens"
        )
    return torch.tensor([ids], device=model.device), plan


def read(file: Path, option: str) -> str:
    """The text in the file that an option names."""
    from foveate.cli.profile import read_texts

    if not file.is_file():
        raise BadInput(f"no such file: {file}; check the path given to {option}")
    return read_texts([file])


def read_lines(file: Path) -> list[str]:
    """The continuations in a file: its lines, or the texts of its JSON lines where the first one is an object."""
    lines = [(n, line) for n, line in enumerate(read(file, "--continuations").splitlines(), 1) if line.strip()]
    if file.suffix != ".jsonl" and not lines[0][1].lstrip().startswith("{"):
        return [line for _, line in lines]
    found = []
    for n, line in lines:
        try:
            one = json.loads(line)
        except json.JSONDecodeError as e:
            raise BadInput(f'{file}, line {n} is no JSON ({e.msg}); write {{"text": "…"}} on each line') from None
        if not isinstance(one, dict) or not isinstance(one.get("text"), str):
            raise BadInput(f'{file}, line {n} has no "text"; write {{"text": "…"}} on each line')
        found.append(one["text"])
    return found


def split_ids(tokenizer: Any, prompt: str, lines: list[str]) -> tuple[list[int], list[list[int]]]:
    """Token ids of a prompt and of what follows it; a chat model is asked with both in one turn, as its template says.

    Raises:
        BadInput: the template changes the prompt, so that nothing is shared.
    """
    special = not getattr(tokenizer, "chat_template", None)
    texts = [prompt + line for line in lines]
    if not special:
        texts = [
            tokenizer.apply_chat_template([{"role": "user", "content": t}], tokenize=False, add_generation_prompt=True)
            for t in texts
        ]
    ends = {text.find(prompt) + len(prompt) for text in texts}
    if any(prompt not in text for text in texts) or len({text[: min(ends)] for text in texts}) > 1:
        raise BadInput(
            "the chat template of the model changes the prompt, so that the continuations have none in common; take "
            "blanks and newlines off its ends"
        )
    end = min(ends)
    head = tokenizer(texts[0][:end], add_special_tokens=special, verbose=False)["input_ids"]
    return head, [tokenizer(text[end:], add_special_tokens=False, verbose=False)["input_ids"] for text in texts]


def continue_all(name: str, prompt: str, lines: list[str], most: tuple[int, int], screen: Any, as_json: bool) -> None:
    """Continues a prompt with each of some lines behind it, so many lines and tokens at a time, and prints it all."""
    import foveate
    from foveate.models import load
    from foveate.profiling import positions

    batch, tokens = most
    with screen.status(f"opening {name} …"):
        model, tokenizer = load(name)
    head, ends = split_ids(tokenizer, prompt, lines)
    limit, longest = positions(model), len(head) + max(map(len, ends)) + tokens
    if limit is not None and longest > limit:
        raise BadInput(
            f"a prompt of {len(head):,} tokens, up to {max(map(len, ends)):,} behind it and {tokens} more do not fit "
            f"in the model's {limit:,} positions; give a shorter prompt or fewer --tokens"
        )
    screen.print(f"{name}: a prompt of {len(head):,} tokens, {len(ends)} continuations, {batch} at a time at most\n")
    stops = model.generation_config.eos_token_id
    stops = stops if isinstance(stops, list) else [stops]
    answers: list[dict[str, Any]] = []
    held = full = 0
    begun = time.perf_counter()
    with foveate.share_prefix(model, head) as shared:
        between = time.perf_counter()
        for first in range(0, len(ends), batch):
            out = shared.generate(ends[first : first + batch], max_new_tokens=tokens, do_sample=False)
            for line, row in zip(lines[first:], out[:, shared.given :].tolist(), strict=False):
                count = next((n for n, token in enumerate(row, 1) if token in stops), len(row))
                answer = tokenizer.decode(row[:count], skip_special_tokens=True)
                answers.append({"text": line, "answer": answer, "tokens": count})
                if not as_json:
                    screen.print(f"[bold]{len(answers)}[/] [dim]{escaped(line)}[/]\n{escaped(answer.strip())}\n")
            held, full = max(held, shared.bytes_held()), max(full, shared.bytes_full())
    ended = time.perf_counter()
    made = sum(one["tokens"] for one in answers)
    figures = {
        "prompt_tokens": len(head),
        "tokens": made,
        "continuations": answers,
        "seconds_to_read": round(between - begun, 3),
        "tokens_per_second": round(made / max(ended - between, 1e-9), 2),
        "bytes_held": held,
        "bytes_full": full,
    }
    if as_json:
        json.dump(figures, sys.stdout, indent=2)
        print()
        return
    screen.print(
        f"[dim]{made} tokens, {figures['tokens_per_second']:.1f} per second after {between - begun:.1f} s to read the "
        f"prompt; KV cache {held / 1e6:.1f} MB, {held / full:.0%} of the {full / 1e6:.1f} MB with a prompt for each[/]"
    )


def escaped(text: str) -> str:
    """Text that rich prints as it is."""
    from rich.markup import escape

    return escape(text)


def generate(
    model: Any, tokenizer: Any, ids: Any, policies: Any, tokens: int, out: Any, planned: Any = None
) -> dict[str, Any]:
    """The continuation, streamed to `out`, and its figures; `planned` is what a plan has attached already."""
    import torch
    from transformers import DynamicCache, TextStreamer

    import foveate

    class Clocked(TextStreamer):
        """Prints tokens as they come, and notes when the first one came."""

        first = 0.0

        def put(self, value: Any) -> None:
            if not self.next_tokens_are_prompt and not self.first:
                self.first = time.perf_counter()
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if out is not None:
                print(text, end="\n" if stream_end else "", file=out, flush=True)

    streamer = Clocked(tokenizer, skip_prompt=True, skip_special_tokens=True)
    cache = DynamicCache(config=model.config)
    begun = time.perf_counter()
    with foveate.attach(model, *policies) if policies else nullcontext() as attached:
        said = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=tokens,
            do_sample=False,
            streamer=streamer,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        )[0, ids.shape[1] :]
    ended = time.perf_counter()
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    seen = ids.shape[1] + len(said) - 1
    # a plan may have taken the attention of some layers out
    every = config.num_hidden_layers
    layers = every - (len(planned.gone) if planned is not None else 0)
    full = 2 * every * heads * width * seen * torch.finfo(model.dtype).bits // 8
    return {
        "prompt_tokens": ids.shape[1],
        "tokens": len(said),
        "answer": tokenizer.decode(said, skip_special_tokens=True),
        "seconds_to_first_token": round(streamer.first - begun, 3),
        "tokens_per_second": round((len(said) - 1) / max(ended - streamer.first, 1e-9), 2),
        "bytes_held": next(
            (a.bytes_held() for a in (planned, attached) if a is not None and a.holding), full * layers // every
        ),
        "bytes_full": full,
    }
