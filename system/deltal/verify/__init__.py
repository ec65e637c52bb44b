"""The room that judges: `verify(prompt, response) -> Verdict`, and the sandbox it judges in.

Importing this package loads no verifier: a sandboxed process must be confined before anything large is imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltal.verify.registry import verify

__all__ = ["verify"]


def __getattr__(name: str) -> Any:
    if name == "verify":
        from deltal.verify.registry import verify

        return verify
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
