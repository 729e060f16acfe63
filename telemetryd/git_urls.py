"""Git URLs: removes credentials from an address, and derives links that a browser can open."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final

_COMMIT_PATH = {
    "github.com": "commit",
    "gitlab.com": "-/commit",
    "bitbucket.org": "commits",
}
MAX_ADDRESS = 1000
"""Characters of an address; what is longer is none."""
# What stands before the host, the host, and the path; each part ends where the next one's sign begins, so that
# a long text that is no address is given up in one pass.
_ADDRESS = re.compile(
    r"(?:(?:https?|ssh)://(?:[^/@\s]*@)?(?P<host>[A-Za-z0-9.-]+)(?::\d+)?/"
    r"|(?:[\w.-]+@)?(?P<scp_host>[A-Za-z0-9.-]+):)"
    r"/*(?P<path>[\w.~+/-]+)",
    re.ASCII,  # a page is a URI, and a lookalike letter is another host
)
_COMMIT = re.compile(r"[0-9A-Fa-f]{7,64}")


# --- What is kept of an address ------------------------------------------------------------------

_HOST: Final = r"(?:[\w.-]+|\[[0-9A-Fa-f:.]+\])"
_PATH: Final = r"[\w.~+:%,!'()*/-]*"
"""What paths of repositories are made of; a parameter with a secret needs a `=`."""
_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,19}):(?=//)")
_PLACE: Final = re.compile(rf"({_HOST})(:[0-9]{{1,5}})?:?(/{_PATH})?")
_SCP: Final = re.compile(rf"{_HOST}:(?!//|$){_PATH}")
_FILE: Final = re.compile(rf"/{_PATH}")
_REST: Final = re.compile(r"[?#;&]")
"""Where a query, a fragment or parameters begin, in whichever wrong form."""
_PARAMETER: Final = re.compile(r"\w=")
"""A named value, as in `token=…`."""
_SIGN: Final = re.compile(rf"://|[@?#]|{_PARAMETER.pattern}")
"""Without a scheme a text may be anything; with one of these it may be an address that holds a secret."""
_ESCAPED: Final = re.compile(r"%(?:[01][0-9A-F]|2[36]|3[ABDF]|40|7F)", re.IGNORECASE)
"""Escapes of controls and of `#&:;=?@`, which no path of a repository needs."""
_GIT: Final = "git@"
"""The user of most servers that are reached by ssh; no secret, and part of the address."""
_SSH: Final = ("ssh", "git+ssh", "ssh+git")


def without_credentials(address: str) -> str | None:
    """Return what is kept of a repository's address: scheme, host, port and path, or a path or a name of other text.

    User and password (except the user `git` of ssh), query, fragment and parameters are left out. Passwords may hold
    any character, also where a URL does not allow it, so everything before the last `@` counts as one. Returns None if
    no form is known in which the host and the path can be distinguished from a secret.
    """
    return _kept(address) if len(address) <= MAX_ADDRESS else _keep(address)


def _keep(address: str) -> str | None:
    text = address.strip()
    match = _SCHEME.match(text)
    if match is None:
        return _without_scheme(address)
    scheme = match[1].lower()
    kept, user = _cut(text[match.end() :].lstrip("/") if scheme != "file" else text[match.end() + 2 :])
    place = None if kept is None or _ESCAPED.search(kept) else _PLACE.fullmatch(kept)
    prefix = f"{scheme}://{_GIT if user and scheme in _SSH and _is_git(user) else ''}"
    if place is not None and (place[3] or user is None):
        return f"{prefix}{place[1]}{place[2] or ''}{place[3] or ''}"
    if kept is not None and scheme == "file" and user is None and _FILE.fullmatch(kept):
        return f"file://{kept}"
    if kept is not None and user is not None and scheme in _SSH and not _ESCAPED.search(kept) and _SCP.fullmatch(kept):
        return f"{prefix}{kept}" if _is_git(user) else kept  # `ssh://git@host:acme/site` mixes two forms, as many do
    return None


_kept: Final = lru_cache(maxsize=1024)(_keep)


def _without_scheme(address: str) -> str | None:
    text = address.strip()
    if _SIGN.search(text) is None:
        return address  # a folder, a name, whatever somebody wrote: nothing in it looks like a secret
    if "://" in text or not text.isprintable():
        return None
    if text.startswith(("/", "./", "../", "~")) and ":" not in text and not text.startswith("//"):
        return _REST.split(text, maxsplit=1)[0].rstrip()  # a folder, whose name may hold an @
    kept, user = _cut(text)
    if user is None or kept is None:
        return None if kept is not None and _PARAMETER.search(kept) else kept
    if _ESCAPED.search(kept) or _SCP.fullmatch(kept) is None:
        return None
    return f"{_GIT}{kept}" if _is_git(user) else kept


def _cut(text: str) -> tuple[str | None, str | None]:
    """Return what stands between user and query, or None if that is unclear, and the user's part if there is one."""
    kept, *rest = _REST.split(text, maxsplit=1)
    if rest and "@" in rest[0]:  # is it in the query, or is the query's sign in the password?
        has_password = ":" in kept and _PLACE.fullmatch(kept) is None
        if "@" in kept or rest[0].count("@") > 1 or not has_password:
            return None, None
        kept, *rest = _REST.split(rest[0].rpartition("@")[2], maxsplit=1)
        return kept.rstrip(), ""
    user, at, place = kept.rpartition("@")
    return place.rstrip(), (user if at else None)


def _is_git(user: str) -> bool:
    return user.partition(":")[0] == "git"


# --- Pages ---------------------------------------------------------------------------------------


def repo_url(git_repo: str | None) -> str | None:
    """Return the https page of a repository on GitHub, GitLab or Bitbucket, else None.

    Understands `https://…`, `ssh://git@…` and `git@host:path`, with or without `.git` and slashes at
    the end. The host must match exactly; user names and passwords in the address are dropped.
    """
    return _page(git_repo) if git_repo and len(git_repo) <= MAX_ADDRESS else None


def commit_url(git_repo: str | None, git_commit_hash: str | None) -> str | None:
    """Return the https page of one commit, or None where the repository or the hash gives none."""
    page = repo_url(git_repo)
    if page is None or not git_commit_hash or _COMMIT.fullmatch(git_commit_hash) is None:
        return None
    host = page.split("/")[2]
    return f"{page}/{_COMMIT_PATH[host]}/{git_commit_hash}"


@lru_cache(maxsize=1024)
def _page(git_repo: str) -> str | None:
    match = _ADDRESS.fullmatch(git_repo.strip())
    if match is None:
        return None
    host = (match["host"] or match["scp_host"]).lower()
    path = match["path"].strip("/").removesuffix(".git").strip("/")
    segments = path.split("/")
    if host not in _COMMIT_PATH or len(segments) < 2 or not all(segment.strip(".") for segment in segments):
        return None
    return f"https://{host}/{path}"
