"""What commands that search for long have in common: they look at what they are given first, and can be broken off."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import NamedTemporaryFile

from foveate.core.errors import BadInput, unknown

__all__ = ["at_least", "folder", "going_on", "known", "resumable"]


def known(kind: str, names: Iterable[str], among: Iterable[str]) -> None:
    """Raises `UnknownName` for the first name that is none of these."""
    there = tuple(among)
    for name in names:
        if name not in there:
            raise unknown(kind, name, there)


def at_least(*options: tuple[str, int, int]) -> None:
    """Raises `BadInput` for the first option whose value is below its least one."""
    for option, value, least in options:
        if value < least:
            raise BadInput(f"{option} {value}: give at least {least}")


def folder(out: Path) -> None:
    """Where nothing can be written is told before hours of work; a folder that is not there yet is not left behind."""
    way = out.absolute(), *out.absolute().parents
    try:
        missing = [p for p in way if not p.exists()]
        at = way[len(missing)]
        if not at.is_dir():
            raise BadInput(f"--out {out}: {at} is a file, not a folder")
        try:
            out.mkdir(parents=True, exist_ok=True)
            with NamedTemporaryFile(dir=out) as file:
                file.write(b"\n")
        finally:
            for p in missing:
                with suppress(OSError):
                    p.rmdir()
    except OSError as e:
        raise BadInput(f"--out {out}: nothing can be written there ({e.strerror or e}); name another folder") from None


def going_on(ledger: Path) -> str:
    """For the line that says what begins: whether something is there already."""
    return ", going on where it was interrupted" if ledger.exists() else ""


@contextmanager
def resumable(done: str, where: Path, again: str = "the same command goes on from it") -> Iterator[None]:
    """Interrupted, a command says where its work so far is and how to go on, and ends as one that was interrupted."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"foveate: interrupted; what was {done} is in {where}, and {again}", file=sys.stderr)
        raise SystemExit(130) from None
