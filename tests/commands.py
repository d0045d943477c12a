"""The command line, run in a process of its own or, where that proves nothing more and costs seconds, in this one."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from unittest import mock

from foveate.cli import main

ENVIRONMENT = {"COLUMNS": "140"}


def process(*arguments, cwd=None, **env):
    return subprocess.run(
        [sys.executable, "-c", "from foveate.cli import main; main()", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **ENVIRONMENT, **env},
        cwd=cwd,
        check=False,
    )


def here(*arguments, cwd=None):
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        contextlib.chdir(cwd or "."),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", ["foveate", *map(str, arguments)]),
        mock.patch.dict(os.environ, ENVIRONMENT),
    ):
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())
