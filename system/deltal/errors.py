"""The exception tree. Each class carries the exit code of `deltal` (contract: 1 no, 2 user, 3 system)."""

from __future__ import annotations

import errno


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


def one_line(error: BaseException, *, line: int | None = None) -> str:
    """An error's text as one line: all of it, or only its first (0) or last (-1) non-empty line, cut at 300 characters.

    The class's name when the error has no text.
    """
    if line is None:
        return " ".join(str(error).split()) or type(error).__name__
    lines = [text.strip() for text in str(error).splitlines() if text.strip()]
    return (lines[line] if lines else type(error).__name__)[:300]
