"""Turns a repository address and a commit hash into pages that a browser can open."""

from __future__ import annotations

import re
from functools import lru_cache

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
    r"(?:(?:https?|ssh)://(?:[^/@\s]*@)?(?P<host>[A-Za-z0-9.-]+)(?::\d+)?/|[\w.-]+@(?P<scp_host>[A-Za-z0-9.-]+):)"
    r"/*(?P<path>[\w.~+/-]+)",
    re.ASCII,  # a page is a URI, and a lookalike letter is another host
)
_COMMIT = re.compile(r"[0-9A-Fa-f]{7,64}")


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
