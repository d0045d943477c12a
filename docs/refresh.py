"""Runs the code blocks of a page, and writes what they print into the block of text that follows each.

python docs/refresh.py docs/tutorial.md             # runs all of it, with the real model, and rewrites the outputs
python docs/refresh.py --python docs/tutorial.md    # leaves the commands out, which take longer
"""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from markdown_it import MarkdownIt

__all__ = ["Block", "blocks", "execute", "namespace"]

# as many columns as a page of the site has
WIDTH = "98"


@dataclass(frozen=True)
class Block:
    """One code block of a page.

    Args:
        language: `python` or `console`.
        code: What is in it.
        line: Its first line in the page, from 0.
        output: What the following block of text says, or None where there is no such block.
        lines: First line of that block, and one past its last.
    """

    language: str
    code: str
    line: int
    output: str | None = None
    lines: tuple[int, int] | None = None


def blocks(text: str) -> Iterator[Block]:
    """The Python and console blocks of a page, each with the output that directly follows it."""
    tokens = [t for t in MarkdownIt().parse(text) if t.level == 0 and t.nesting >= 0]
    for token, after in zip(tokens, [*tokens[1:], None], strict=True):
        if token.type != "fence" or token.info not in ("python", "console"):
            continue
        output, lines = None, None
        if after is not None and after.type == "fence" and after.info == "text":
            output, lines = after.content, tuple(after.map)
        yield Block(token.info, token.content, token.map[0], output, lines)


@contextlib.contextmanager
def namespace(**names: Any) -> Iterator[dict[str, Any]]:
    """The names of a page. A module of its own: dataclasses look up where a class was made."""
    module = sys.modules["page"] = ModuleType("page")
    vars(module).update(names)
    try:
        yield vars(module)
    finally:
        del sys.modules["page"]


def execute(block: Block, names: dict[str, Any], page: str) -> str:
    """What a Python block prints; `names` is the page's namespace, which the blocks share."""
    out = io.StringIO()
    # the line numbers of the page, so that a traceback points into it
    code = compile("\n" * (block.line + 1) + block.code, page, "exec", dont_inherit=True)
    with contextlib.redirect_stdout(out):
        exec(code, names)
    return out.getvalue()


def shell(block: Block) -> str:
    """What the commands of a console block print."""
    commands = [line[2:] for line in block.code.splitlines() if line.startswith("$ ")]
    env = os.environ | {"COLUMNS": WIDTH, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    run = subprocess.run("\n".join(commands), shell=True, env=env, stdout=subprocess.PIPE, text=True)
    # 1 is a check that fails, which a page may want to show; 2 is a mistake
    if run.returncode > 1:
        raise SystemExit(f"{block.code.strip()}: exit code {run.returncode}")
    return run.stdout


def main(page: str, commands: bool = True) -> None:
    path = Path(page)
    text = path.read_text(encoding="utf-8")
    lines, moved = text.splitlines(), 0
    with namespace() as names:
        for block in blocks(text):
            if block.language == "console" and (block.output is None or not commands):
                continue
            print(f"{page}:{block.line + 1} …", file=sys.stderr)
            printed = execute(block, names, page) if block.language == "python" else shell(block)
            if block.lines is not None:
                first, last = (n + moved for n in block.lines)
                new = [line.rstrip() for line in printed.strip("\n").splitlines()]
                lines[first + 1 : last - 1] = new
                moved += len(new) - (last - first - 2)
            elif printed:
                print(printed, end="")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        if name != "--python":
            main(name, commands="--python" not in sys.argv)
