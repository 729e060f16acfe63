"""Which letters count as the same when the case does not matter."""

from __future__ import annotations


def forms(text: str) -> dict[str, dict[str, None]]:
    """Return for each sign of a text all that count as the same: its other case, and what shares one with it."""
    found: dict[str, dict[str, None]] = {}
    for sign in text:
        same = dict.fromkeys(form for form in (sign, sign.lower(), sign.upper()) if len(form) == 1)
        for form in [*same]:
            same |= found.get(form, {})
        found |= dict.fromkeys(same, same)
    return found
