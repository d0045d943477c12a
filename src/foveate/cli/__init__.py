"""The command line: one command per file of this folder, found by its name."""

from __future__ import annotations

import importlib
import pkgutil
import sys

import typer

from foveate import __version__
from foveate.core.errors import FoveateError

__all__ = ["main"]


def version(asked: bool) -> bool:
    if asked:
        print(f"foveate {__version__}")
        raise typer.Exit
    return asked


def build() -> typer.Typer:
    """The application, with the commands in this folder."""
    app = typer.Typer(
        help="See, steer, compress and replace the attention of a transformer.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback()
    def options(
        version: bool = typer.Option(False, "--version", callback=version, is_eager=True, help="Print the version."),
    ) -> None: ...

    for info in pkgutil.iter_modules(__path__):
        if not info.name.startswith("_"):
            app.command(info.name.replace("_", "-"))(importlib.import_module(f"{__name__}.{info.name}").command)
    return app


def main() -> None:
    """Runs the command line; a mistake is one line on stderr and exit code 2, a traceback only with --debug."""
    debug = "--debug" in sys.argv
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    try:
        build()(arguments, prog_name="foveate")
    except FoveateError as e:
        if debug:
            raise
        complain(str(e))
    except OSError as e:
        if debug:
            raise
        where = f"{e.filename}: " if e.filename else ""
        complain(f"{where}{e.strerror or e} (--debug shows where)")
    except KeyboardInterrupt:
        complain("interrupted; nothing was written", 130)
    except Exception as e:
        # a bug of ours: still one line, and the way to tell us more
        if debug:
            raise
        complain(f"{type(e).__name__}: {e}. This should not happen; run again with --debug and report what it shows")


def complain(message: str, code: int = 2) -> None:
    print(f"foveate: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)
