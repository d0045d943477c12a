"""Results of long runs, kept as they come, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from foveate.core.errors import BadInput
from foveate.core.plan import fingerprint

__all__ = ["Ledger", "circumstances"]

PANGRAM = "The five boxing wizards jump quickly, 0123456789 times.\n"

START = b'{"key": "'
"""What every line begins with."""


class Ledger:
    """Results by key, each a line of JSON at the end of a file; without a file they last as long as the object.

    Args:
        file: The file; None: none.

    Raises:
        BadInput: the file is something else.
    """

    def __init__(self, file: str | Path | None = None) -> None:
        self.file = None if file is None else Path(file)
        self.found: dict[str, Any] = {}
        if self.file is None or not self.file.exists():
            return
        nothing = f"{self.file} holds no results of an earlier run"
        try:
            content = self.file.read_bytes()
        except OSError as e:
            raise BadInput(f"{nothing} ({e}); name another file") from None
        *lines, torn = content.split(b"\n")
        for n, line in enumerate(lines):
            try:
                entry = json.loads(line.decode("utf-8"))
                self.found[entry["key"]] = entry["result"]
            except (ValueError, KeyError, TypeError) as e:
                if n == 0 and isinstance(e, UnicodeDecodeError):
                    raise BadInput(f"{nothing} ({e}); name another file") from None
                raise BadInput(
                    f"{self.file}, line {n + 1}, is no result of an earlier run; name another file, or delete this one"
                ) from None
        # the line that was being written when the run was interrupted, also where only its end is missing
        if torn:
            if not lines and torn[: len(START)] != START[: len(torn)]:
                raise BadInput(f"{nothing}; name another file")
            with self.file.open("r+b") as out:
                out.truncate(len(content) - len(torn))

    @staticmethod
    def key(*parts: Any) -> str:
        """A key for what a result depends on, told by its repr."""
        return hashlib.sha256("\n".join(map(repr, parts)).encode()).hexdigest()[:24]

    def __contains__(self, key: str) -> bool:
        return key in self.found

    def __getitem__(self, key: str) -> Any:
        return self.found[key]

    def add(self, key: str, result: Any) -> None:
        """Keeps a result; on disk before this returns."""
        self.found[key] = result
        if self.file is None:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("ab") as out:
            out.write(json.dumps({"key": key, "result": result}).encode() + b"\n")


def circumstances(model: Any, tokenizer: Any = None) -> tuple[Any, ...]:
    """What a number that was measured on a model depends on besides what was asked: a part of a ledger's keys.

    Results in another precision, of another tokenizer or chat template, or of another version are other results.
    """
    from foveate import __version__

    found: list[Any] = [fingerprint(model), str(model.dtype), __version__]
    if tokenizer is not None:
        sample = tokenizer(PANGRAM, verbose=False)["input_ids"]
        found += [len(tokenizer), list(sample), getattr(tokenizer, "chat_template", None)]
    return tuple(found)
