"""Reads commit, branch and origin of a git checkout from its files, without starting a process."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from telemetryd.client.reftables import MOST_BYTES, find_reference
from telemetryd.git_urls import without_credentials

_HASH: Final = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")
_BRANCH: Final = "refs/heads/"
_IN_REFTABLES: Final = "ref: refs/heads/.invalid"
"""What HEAD says for programs that know no reftables; no reference has such a name (git-check-ref-format(1))."""
_LINKS: Final = 5
"""References that refer to references, one after the other: as many as git follows."""
_SHORT: Final = 8 << 10
_BLOCK: Final = 1 << 20
_MOST_CONFIG: Final = 1 << 20
_MOST_PACKED: Final = 64 << 20


class _Folders(NamedTuple):
    """A checkout's own git folder, and the one that it shares with the repository's other checkouts."""

    own: Path
    common: Path


def git_fields(folder: Path) -> dict[str, str]:
    """Return git_repo, git_branch and git_commit_hash of the checkout around a folder, as far as they are known.

    What cannot be read costs only itself. Credentials in the remote's address are left out. GIT_DIR wins, as in git.
    """
    try:
        found = _git_folders(folder)
    except OSError:  # a folder that we may not look into
        return {}
    if found is None:
        return {}
    branch, commit = _head(found)
    fields = {"git_repo": _remote(found.common / "config"), "git_branch": branch, "git_commit_hash": commit}
    return {name: _text(value) for name, value in fields.items() if value}


def _text(value: str) -> str:
    return value.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _read(path: Path, most: int = _SHORT) -> str | None:
    data = _read_bytes(path, most)
    return None if data is None else os.fsdecode(data)


def _read_bytes(path: Path, most: int = MOST_BYTES) -> bytes | None:
    """Return a file's content unless it is larger or cannot be read; a pipe in its place is not waited for."""
    try:
        file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except (OSError, ValueError):  # a NUL in a name that was read from a file
        return None
    try:
        facts = os.fstat(file)
        if not stat.S_ISREG(facts.st_mode) or facts.st_size > most:
            return None
        # Not by os.fdopen(), which imports: at the end of the interpreter that is too late.
        parts: list[bytes] = []
        left = most + 1
        while left > 0 and (part := os.read(file, min(left, _BLOCK))):
            parts.append(part)
            left -= len(part)
    except OSError:
        return None
    finally:
        os.close(file)
    return b"".join(parts) if left > 0 else None


def _git_folders(folder: Path) -> _Folders | None:
    given = os.environ.get("GIT_DIR")
    if given:
        return _with_common(folder / given)
    for place in (folder, *folder.parents):
        entry = place / ".git"
        if entry.is_dir():
            return _with_common(entry)
        text = _read(entry)
        if text is not None and text.startswith("gitdir:"):  # of a worktree or a submodule
            return _with_common(place / text.removeprefix("gitdir:").strip())
        if (place / "HEAD").is_file() and (place / "objects").is_dir() and (place / "refs").is_dir():
            return _with_common(place)  # a repository without a checkout
    return None


def _with_common(own: Path) -> _Folders:
    common = os.environ.get("GIT_COMMON_DIR") or (_read(own / "commondir") or "").strip()
    return _Folders(own, own / common if common else own)


# --- HEAD ----------------------------------------------------------------------------------------


def _head(folders: _Folders) -> tuple[str | None, str | None]:
    """Return the branch that is checked out, if one is, and its commit."""
    name = _linked(folders.own / "HEAD")
    head = f"ref: {name}" if name is not None else (_read(folders.own / "HEAD") or "").strip()
    if head == _IN_REFTABLES:
        head = find_reference(folders.own, "HEAD", _read_bytes) or ""
    if not head.startswith("ref:"):
        return None, _commit(head)
    name = head.removeprefix("ref:").strip()
    branch = name.removeprefix(_BRANCH) if name.startswith(_BRANCH) and _is_name(name) else None
    return branch, _resolve(name, folders)


def _linked(head: Path) -> str | None:
    """Return what HEAD refers to if it is a symbolic link, as git made it long ago."""
    try:
        target = os.readlink(head)
    except (OSError, ValueError):
        return None
    return target if target.startswith("refs/") else None


def _commit(text: str) -> str | None:
    return text if _HASH.fullmatch(text) else None


def _is_name(name: str) -> bool:
    return name.startswith("refs/") and not any(part == "" or part.startswith(".") for part in name.split("/"))


def _resolve(name: str, folders: _Folders) -> str | None:
    for _ in range(_LINKS):
        if not _is_name(name):
            return None
        text = _read(folders.own / name)
        text = text if text is not None else _read(folders.common / name)
        text = (text or find_reference(folders.common, name, _read_bytes) or "").strip()
        if not text.startswith("ref:"):
            return _commit(text) or _packed(name, folders.common)
        name = text.removeprefix("ref:").strip()
    return None


def _packed(name: str, common: Path) -> str | None:
    text = _read(common / "packed-refs", _MOST_PACKED) or ""
    at = text.find(f" {name}\n")
    return _commit(text[text.rfind("\n", 0, at) + 1 : at]) if at >= 0 else None


# --- The configuration ---------------------------------------------------------------------------

_SECTION: Final = re.compile(r'\s*\[\s*([A-Za-z0-9.-]+)\s*(?:"((?:[^"\\]|\\.)*)")?\s*\]')
_ENTRY: Final = re.compile(r"\s*([A-Za-z][A-Za-z0-9-]*)\s*(?:=\s*(.*?))?\s*$")
_ESCAPE: Final = re.compile(r"\\(.)")
# A value is made of quoted and of bare parts; a bare # or ; begins a comment.
_PART: Final = re.compile(r'"((?:[^"\\]|\\.)*)"|((?:[^"\\#;]|\\.)+)')


def _remote(config: Path) -> str | None:
    """Return the address of `origin`, else of the first remote, without credentials."""
    remotes: dict[str, str] = {}
    instead: dict[str, str] = {}
    for section, name, value in _entries(config, _LINKS):
        kind, _, which = section.partition(".")
        if kind == "remote" and name == "url":
            remotes.setdefault(which, value)
        elif kind == "url" and name == "insteadof":
            instead[value] = which
    address = remotes.get("origin") or next(iter(remotes.values()), None)
    if address is None:
        return None
    short = max((start for start in instead if start and address.startswith(start)), key=len, default=None)
    return without_credentials(_text(address if short is None else instead[short] + address[len(short) :]))


def _entries(config: Path, depth: int) -> Iterator[tuple[str, str, str]]:
    """Yield section, name and value of each entry (git-config(1)), those of included files in their place."""
    section = ""
    for whole in (_read(config, _MOST_CONFIG) or "").replace("\\\n", "").split("\n"):
        line = whole
        while match := _SECTION.match(line):  # entries may follow in the same line
            kind, _, old = match[1].lower().partition(".")
            which = _unescaped(match[2]) if match[2] is not None else old
            section, line = f"{kind}.{which}", line[match.end() :]
        entry = _ENTRY.match(line)
        if entry is None:
            continue
        name, value = entry[1].lower(), _value(entry[2] or "")
        if (section, name) == ("include.", "path") and depth and value:
            included = os.path.expanduser(value)  # Path's raises where there is no home
            yield from _entries(config.parent / included, depth - 1)
        else:
            yield section, name, value


def _unescaped(text: str) -> str:
    return _ESCAPE.sub(lambda match: match[1], text)  # a template would import a module (the end of the interpreter)


def _value(text: str) -> str:
    parts: list[str] = []
    at = 0
    while match := _PART.match(text, at):
        parts.append(_unescaped(match[1] if match[1] is not None else match[2]))
        at = match.end()
    return "".join(parts).strip()
