"""Reads the code blocks of the guide by the heading they stand under, byte for byte as printed there."""

from __future__ import annotations

import json
import re
import textwrap
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

GUIDE = Path(__file__).with_name("DEPLOYMENT_GUIDE.md")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block, without its fence and indentation."""

    heading: str
    language: str
    text: str


@dataclass(frozen=True, slots=True)
class Section:
    """What stands between a heading and the next one: plain lines, and blocks."""

    heading: str
    lines: tuple[str, ...]
    blocks: tuple[Block, ...]


@cache
def sections() -> tuple[Section, ...]:
    """Return the guide's sections in order; a `#` inside a fence is no heading."""
    found: list[tuple[str, list[str], list[Block]]] = [("", [], [])]
    fence: tuple[str, list[str]] | None = None
    for line in GUIDE.read_text("utf-8").splitlines():
        heading, lines, blocks = found[-1]
        if fence is not None:
            if line.strip() == "```":
                blocks.append(Block(heading, fence[0], textwrap.dedent("\n".join(fence[1])) + "\n"))
                fence = None
            else:
                fence[1].append(line)
        elif line.lstrip().startswith("```"):
            fence = (line.strip().removeprefix("```"), [])
        elif match := re.fullmatch(r"#+ (.+)", line):
            found.append((match[1], [], []))
        else:
            lines.append(line)
    assert fence is None
    return tuple(Section(heading, tuple(lines), tuple(blocks)) for heading, lines, blocks in found)


def section(heading: str) -> Section:
    """Return the one section with this heading."""
    (one,) = (candidate for candidate in sections() if candidate.heading == heading)
    return one


def blocks(heading: str, language: str) -> list[str]:
    """Return the texts of a section's blocks in one language; there must be some."""
    texts = [block.text for block in section(heading).blocks if block.language == language]
    assert texts, f"the guide has no {language} block under {heading!r}"
    return texts


def block(heading: str, language: str = "bash") -> str:
    """Return the text of the only block of a language in a section."""
    (text,) = blocks(heading, language)
    return text


def examples(heading: str) -> list[Any]:
    """Return a section's JSON blocks, decoded; the guide's `...` for "and so on" is left out."""
    return [json.loads(re.sub(r",\s*\.\.\.", "", text)) for text in blocks(heading, "json")]


def example(heading: str) -> Any:
    """Return the only JSON block of a section, decoded."""
    (value,) = examples(heading)
    return value


def commands(text: str) -> list[str]:
    """Split a block into its commands: comments go, a line that ends in a backslash or an open quote goes on."""
    found: list[str] = []
    pending = ""
    for line in text.splitlines():
        if not pending and (not line.strip() or line.startswith("#")):
            continue
        pending += line
        if line.endswith("\\") or pending.count("'") % 2:
            pending += "\n"
        else:
            found.append(pending)
            pending = ""
    assert not pending, pending
    return found


def names(heading: str, after: str) -> list[tuple[str, str]]:
    """Return name and first parenthesised word of a section's bullets that follow a bold label."""
    lines = section(heading).lines
    start = next(number for number, line in enumerate(lines) if line.startswith(f"**{after}"))
    found = []
    for line in lines[start + 1 :]:
        if match := re.match(r"- `(\w+)` \(([\w]+)", line):
            found.append((match[1], match[2]))
        elif line.strip():
            break
    assert found, f"the guide has no list after {after!r}"
    return found
