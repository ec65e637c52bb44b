"""The exception tree. Each class carries the exit code of `deltal` (contract: 1 no, 2 user, 3 system)."""

from __future__ import annotations

import errno
import re
from typing import Literal


class DeltalError(Exception):
    """Base of every error deltal raises on purpose: one line that says what, where and what to do."""

    exit_code = 3


class UserError(DeltalError):
    """The user's mistake: the line says what was wrong and what to do."""

    exit_code = 2


class ConfigError(UserError):
    """A configuration key or value is wrong."""


class DataError(UserError):
    """A data set is missing or broken; names file and line."""


class ModelError(UserError):
    """A model folder or name cannot be used."""


class ResourceError(UserError):
    """Memory, shared memory, CPUs or GPUs are too few for what is asked."""


class FolderError(UserError):
    """A folder or file cannot be written: the disk is full, or it is not ours to write."""


class RunInUseError(UserError):
    """The run folder belongs to a living run."""


class RunNotFoundError(UserError):
    """No such run, or it is not running."""


class AddressError(UserError):
    """No Ray cluster answers at the address."""


class DeadlineError(DeltalError):
    """A wait was over before what it waited for came; names the wait."""


class JournalError(DeltalError):
    """The journal is damaged, or a second writer was seen."""


class LedgerError(DeltalError):
    """The ledger law does not hold."""


class FilteredTooManyError(DeltalError):
    """More than `max_refill` batches' worth of groups in a row were filtered, not only for prompts too long."""


class LearnerError(DeltalError):
    """The learner cannot go on."""


class TransferError(DeltalError):
    """Weights did not come over; the receiver keeps what it has and asks again."""


class ActorLostError(DeltalError):
    """An actor died more often than the supervisor may restart it."""


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def not_written(path: object, error: OSError) -> FolderError:
    """The error of a file that could not be written: which, why, and what to do."""
    advice = "free some space there; a run goes on with `deltal resume`" if error.errno in FULL else "choose another"
    return FolderError(f"{path} cannot be written: {error.strerror or one_line(error)}; {advice}")


FRAME = re.compile(r'\s+File ".*", line \d+')
"""A line of a traceback."""


def one_line(error: BaseException, *, line: Literal[0] | None = None) -> str:
    """What an error says, as one line: all of it, or (0) only its first line with content, cut at 300 characters.

    Of a remote call it is what the call raised, not the traceback that Ray puts before it; of a lost process the
    reason, which Ray puts last; of pydantic's the first finding. The class's name when the error has no text.
    """
    while isinstance(cause := getattr(error, "cause", None), BaseException):
        error = cause
    text = _finding(error) or _after_traceback(str(error))
    if line is None:
        return " ".join(text.split()) or type(error).__name__
    lines = [part.strip() for part in text.splitlines() if part.strip()]
    is_lost = getattr(error, "actor_init_failed", None) is False
    return (lines[-1 if is_lost else 0] if lines else type(error).__name__)[:300]


def _finding(error: BaseException) -> str:
    """The first finding of a pydantic error, whose text begins with a count and ends with a link; else nothing."""
    if type(error).__name__ != "ValidationError" or not callable(findings := getattr(error, "errors", None)):
        return ""
    finding = findings()[0]
    place = ".".join(str(part) for part in finding.get("loc", ()))
    said = str(finding.get("msg", "")).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    return f"{place}: {said}" if place else said


def _after_traceback(text: str) -> str:
    """What stands below the last traceback inside a text: the error it ended in."""
    lines = text.splitlines()
    frames = [number for number, line in enumerate(lines) if FRAME.match(line)]
    if not frames:
        return text
    below = [number for number in range(frames[-1] + 1, len(lines)) if lines[number][:1].strip()]
    return "\n".join(lines[below[0] :]) if below else text
