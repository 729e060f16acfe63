"""associate-commit, commit-url and repo-url, sentence by sentence."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import Api, make_run
from tests.contract.wire import RUNS, check_error, places, send

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture
def api(shared: Api) -> Api:
    """One app for the whole module; tests that need one of their own ask for `make_api`."""
    return shared


HASH = "0123456789abcdef0123456789abcdef01234567"


async def stored_run(api: Api, **fields: Any) -> tuple[str, str]:
    run = make_run(**fields)
    await api.post(run)
    return f"{RUNS}/{run['event_id']}", run["run_id"]


async def test_a_commit_is_associated(api: Api) -> None:
    path, run_id = await stored_run(api, git_repo="git@github.com:octo/site.git")
    before = await api.get(path)
    body = {
        "commit_hash": HASH,
        "commit_source": "llm",
        "commit_author": "Ada",
        "commit_timestamp": "2025-12-24T12:00:00+02:00",
    }
    answer = await api.call("POST", f"{path}/associate-commit", json=body, status=200)
    assert answer == {"status": "success", "event_id": before["event_id"], "run_id": run_id, "commit_hash": HASH}
    after = await api.get(path)
    assert after == {
        **before,
        "git_commit_hash": HASH,
        "git_commit_source": "llm",
        "git_commit_author": "Ada",
        "git_commit_timestamp": "2025-12-24T10:00:00.000000Z",
        "commit_url": f"https://github.com/octo/site/commit/{HASH}",
        "updated_at": after["updated_at"],
    }
    assert after["updated_at"] > before["updated_at"]


async def test_author_and_timestamp_are_optional_and_stay(api: Api) -> None:
    path, _ = await stored_run(api, git_commit_author="Ada", git_commit_timestamp="2025-12-24T10:00:00Z")
    for extra in ({}, {"commit_author": None, "commit_timestamp": None}):
        body = {"commit_hash": "abc1234", "commit_source": "manual", **extra}
        await api.call("POST", f"{path}/associate-commit", json=body, status=200)
    after = await api.get(path)
    assert after["git_commit_hash"] == "abc1234"
    assert after["git_commit_author"] == "Ada"
    assert after["git_commit_timestamp"] == "2025-12-24T10:00:00.000000Z"


@pytest.mark.parametrize("commit", ["abcd", "ABCDEF0", "a" * 64, "r1234", "../../../"])
@pytest.mark.parametrize("source", ["manual", "llm", "ci"])
async def test_hashes_of_4_to_64_characters_and_every_source(api: Api, commit: str, source: str) -> None:
    path, _ = await stored_run(api)
    body = {"commit_hash": commit, "commit_source": source}
    answer = await api.call("POST", f"{path}/associate-commit", json=body, status=200)
    assert answer["commit_hash"] == commit
    assert (await api.get(path))["git_commit_source"] == source


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"commit_hash": None}, "commit_hash"),
        ({"commit_hash": ""}, "commit_hash"),
        ({"commit_hash": "abc"}, "commit_hash"),
        ({"commit_hash": "a" * 65}, "commit_hash"),
        ({"commit_hash": "a" * 100_000}, "commit_hash"),
        ({"commit_hash": "abc def"}, "commit_hash"),
        ({"commit_hash": "abc\0def"}, "commit_hash"),
        ({"commit_hash": "abcdef0\n"}, "commit_hash"),
        ({"commit_hash": 1234567}, "commit_hash"),
        ({"commit_source": "robot"}, "commit_source"),
        ({"commit_source": None}, "commit_source"),
        ({"commit_author": 5}, "commit_author"),
        ({"commit_author": "a\0"}, "commit_author"),
        ({"commit_timestamp": "yesterday"}, "commit_timestamp"),
        ({"commit_timestamp": 5}, "commit_timestamp"),
    ],
)
async def test_a_bad_value_is_422_and_changes_nothing(api: Api, change: dict[str, Any], place: str) -> None:
    path, _ = await stored_run(api)
    before = await api.get(path)
    body = {"commit_hash": HASH, "commit_source": "ci", **change}
    detail = check_error(await send(api, "POST", f"{path}/associate-commit", json=body), 422)
    assert places(detail) == [("body", place)]
    assert await api.get(path) == before


async def test_hash_and_source_are_required(api: Api) -> None:
    path, _ = await stored_run(api)
    detail = check_error(await send(api, "POST", f"{path}/associate-commit", json={}), 422)
    assert set(places(detail)) == {("body", "commit_hash"), ("body", "commit_source")}


async def test_unknown_fields_are_named(api: Api) -> None:
    path, _ = await stored_run(api)
    body = {"commit_hash": HASH, "commit_source": "ci", "color": 1}
    answer = await api.call("POST", f"{path}/associate-commit", json=body, status=200)
    assert answer["warnings"] == ["Unknown field ignored: color"]


@pytest.mark.parametrize("what", ["commit-url", "repo-url", "associate-commit"])
async def test_an_unknown_run_is_404(api: Api, what: str) -> None:
    body = {"commit_hash": HASH, "commit_source": "ci"}
    path = f"{RUNS}/abc123/{what}"
    answer = await (send(api, "POST", path, json=body) if what == "associate-commit" else send(api, "GET", path))
    assert check_error(answer, 404) == "Run not found: abc123"


GITHUB = "https://github.com/octo/site"
GITLAB = "https://gitlab.com/group/sub/site"
BITBUCKET = "https://bitbucket.org/octo/site"
COMMIT_PATHS = {GITHUB: "commit", GITLAB: "-/commit", BITBUCKET: "commits"}


@pytest.mark.parametrize(
    ("repo", "page"),
    [
        ("https://github.com/octo/site", GITHUB),
        ("https://github.com/octo/site.git", GITHUB),
        ("https://github.com/octo/site/", GITHUB),
        ("https://github.com/octo/site.git/", GITHUB),
        ("https://GitHub.com/octo/site", GITHUB),
        ("https://user:secret@github.com/octo/site.git", GITHUB),
        ("ssh://git@github.com/octo/site.git", GITHUB),
        ("git@github.com:octo/site.git", GITHUB),
        ("git@github.com:/octo/site", GITHUB),
        ("https://gitlab.com/group/sub/site.git", GITLAB),
        ("ssh://git@gitlab.com/group/sub/site", GITLAB),
        ("git@gitlab.com:group/sub/site.git", GITLAB),
        ("https://bitbucket.org/octo/site", BITBUCKET),
        ("ssh://git@bitbucket.org/octo/site.git", BITBUCKET),
        ("git@bitbucket.org:octo/site.git", BITBUCKET),
        ("https://github.com.evil.com/octo/site", None),
        ("https://evil-github.com/octo/site", None),
        ("https://www.github.com/octo/site", None),
        ("https://evil.com/github.com/octo/site", None),
        ("https://github.com@evil.com/octo/site", None),
        ("git@evil.com:github.com/octo.git", None),
        ("https://git.example.org/octo/site.git", None),
        ("javascript:alert(1)//github.com/a/b", None),
        ("https://github.com/octo/../../evil", None),
        ("https://github.com/octo/si te", None),
        ("https://github.com/octo/<script>", None),
        ("https://github.com/", None),
        ("/srv/git/site.git", None),
        ("", None),
        (None, None),
    ],
)
async def test_the_pages_of_a_repository(api: Api, repo: str | None, page: str | None) -> None:
    path, _ = await stored_run(api, git_repo=repo, git_commit_hash=HASH)
    commit = f"{page}/{COMMIT_PATHS[page]}/{HASH}" if page is not None else None
    assert await api.get(f"{path}/repo-url") == {"repo_url": page}
    assert await api.get(f"{path}/commit-url") == {"commit_url": commit}
    stored = await api.get(path)
    assert (stored["repo_url"], stored["commit_url"]) == (page, commit)
    [listed] = await api.list(limit="1")  # the newest
    assert listed == stored


async def test_without_a_commit_there_is_no_page_of_it(api: Api) -> None:
    path, _ = await stored_run(api, git_repo=GITHUB)
    assert await api.get(f"{path}/commit-url") == {"commit_url": None}
    assert await api.get(f"{path}/repo-url") == {"repo_url": GITHUB}
