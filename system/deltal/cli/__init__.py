"""The command line: one thin function a verb. Exit codes: 0 done, 1 the answer is no, 2 your mistake, 3 our fault."""

# ruff: noqa: I001
from __future__ import annotations

import errno
import sys
import traceback

import typer
from rich.markup import escape

# Importing a file of verbs puts them on the app, in the order in which --help shows them.
from deltal.cli import training, steering, results  # noqa: F401
from deltal.cli.app import app, err
from deltal.errors import FULL, DeltalError, not_written

__all__ = ["app", "main"]


NOT_OURS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)
"""Why a file that the user named may refuse to be written, beside a full disk."""


def main() -> None:
    """Entry point: errors of deltal become one line and their exit code."""
    try:
        # Outside its standalone mode typer hands the code of a `typer.Exit` back instead of leaving with it.
        sys.exit(app(standalone_mode=False))
    except typer._click.exceptions.ClickException as error:
        error.show()
        sys.exit(2)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except DeltalError as error:
        err.print(f"[bold red]deltal:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.filename is None or error.errno not in (*FULL, *NOT_OURS):
            raise
        err.print(f"[bold red]deltal:[/] {escape(str(not_written(error.filename, error)))}", soft_wrap=True)
        sys.exit(2)
    except Exception:
        # A defect of ours: the traceback is what a report of it needs; 1 would say "the answer is no".
        traceback.print_exc()
        sys.exit(3)
