r"""`exact`: the answer is a word, a name or a phrase, and the response says just that.

Nothing is computed: 0.5 is not 1/2, and `szyc` is not `cyzs`. For numbers take `gsm8k`, for formulas `math`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from typing import Any

from deltal.errors import DataError
from deltal.verify.tasks.answers import Finding, compared, final_part, last_box, last_line, last_tag, shortened

LONGEST = 2000
"""Characters of an answer."""
MARK = "####"
INTRODUCED = re.compile(
    r"\banswer(?:[ \t]{1,4}is)?[ \t*_]{0,4}:(?:\*\*|__)?|\banswer[ \t]{1,4}is\b(?![ \t]{0,4}:)", re.IGNORECASE
)
PAIRS = (
    (r"\text{", "}"), (r"\textbf{", "}"), (r"\mathrm{", "}"), (r"\mathbf{", "}"), ("**", "**"), ("__", "__"),
    ("*", "*"), ("_", "_"), ("`", "`"), ("$", "$"), ('"', '"'), ("'", "'"), ("“", "”"), ("‘", "’"), ("«", "»"),
    ("(", ")"),
)  # fmt: skip
"""What may stand around an answer; taken away in pairs only, so that -5, .5, C++ and f(x) stay what they are."""
SHOUTED = re.compile(r"(?<=[^\W\d_]|[\"'’”»*])[!?]+$")
"""After a letter or a quotation only: 5! is another number than 5."""


def exact(answer: str, fields: Mapping[str, Any], text: str) -> Finding:
    r"""What the response gives as its answer is the gold answer: equal as text, not as a quantity.

    Its answer is what stands in the last \boxed{…}, else in the last `<answer>…</answer>`, else after the last `####`,
    else after the last `answer:` or `answer is` (both up to the end of the line, or the next line if that is empty);
    else it is the last line that is not empty. All of that must be the gold answer: a sentence around it, or a second
    candidate, makes it wrong.
    Not compared are: upper and lower case, forms that Unicode (NFKC) calls the same, invisible characters, how much
    space stands between words, quotes, brackets ( ), dollars and emphasis around the whole, and `.`, `,`, `;`, `:` at
    its end (`!` and `?` after a letter).
    """
    gold = normalised(answer)
    if not gold:
        raise DataError(f"the answer {shortened(answer)} of an exact prompt holds nothing to compare")
    said = given(text)
    if not said.strip():
        return Finding(False, None, "no answer")
    if len(said) > LONGEST + len(answer):
        return Finding(False, said, "too long")
    return compared(normalised(said) == gold, said)


def given(text: str) -> str:
    """What a response gives as its answer, by the rule of `exact`; "" when there is nothing."""
    last = final_part(text)
    for marked in (last_box(last), last_tag(last, "answer")):
        if marked is not None:
            return marked
    if MARK in last:
        return first_line(last.rpartition(MARK)[2])
    end = None
    for found in INTRODUCED.finditer(last):
        end = found.end()
    return last_line(last) if end is None else first_line(last[end:])


def first_line(text: str) -> str:
    """The rest of the line, or the next line that is not empty: `The answer is:` often stands alone."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def normalised(text: str) -> str:
    """A text without what `exact` does not compare."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    plain = " ".join("".join(sign for sign in folded if unicodedata.category(sign) != "Cf").split())
    while True:
        bare = SHOUTED.sub("", _unpaired(plain).rstrip(".,;: ")).strip()
        if bare == plain or not bare:
            return plain
        plain = bare


def _unpaired(text: str) -> str:
    for opening, closing in PAIRS:
        if len(text) > len(opening) + len(closing) and text.startswith(opening) and text.endswith(closing):
            inner = text[len(opening) : len(text) - len(closing)]
            if opening[-1] not in inner and closing[-1] not in inner:
                return inner.strip()
    return text
