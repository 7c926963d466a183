"""GSM8K, grade-school word problems whose solutions end in `#### answer` (arXiv 2110.14168)."""

import re

_ANSWER = re.compile(r"#### (-?[0-9.,]+)")


def extract_answer(text: str) -> str | None:
    """The first number after a `#### `, without its thousands commas; None if there is none."""
    found = _ANSWER.search(text)
    return found.group(1).replace(",", "") if found else None
