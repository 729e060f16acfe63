from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from telemetryd.git_urls import commit_url, repo_url, without_credentials

GITHUB = "https://github.com/acme/tool"
GITLAB = "https://gitlab.com/acme/tool"
BITBUCKET = "https://bitbucket.org/acme/tool"
HASH = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("address", "page"),
    [
        ("https://github.com/acme/tool", GITHUB),
        ("https://github.com/acme/tool.git", GITHUB),
        ("https://github.com/acme/tool/", GITHUB),
        ("https://github.com/acme/tool.git/", GITHUB),
        ("https://github.com/acme/tool//", GITHUB),
        ("https://github.com//acme/tool", GITHUB),
        ("http://github.com/acme/tool", GITHUB),
        ("https://GitHub.com/acme/tool", GITHUB),
        ("  https://github.com/acme/tool\n", GITHUB),
        ("https://github.com:443/acme/tool", GITHUB),
        ("https://user@github.com/acme/tool", GITHUB),
        ("https://user:pass@github.com/acme/tool.git", GITHUB),
        ("https://x-access-token:ghp_secret@github.com/acme/tool", GITHUB),
        ("ssh://git@github.com/acme/tool.git", GITHUB),
        ("ssh://git@github.com:22/acme/tool.git", GITHUB),
        ("git@github.com:acme/tool.git", GITHUB),
        ("git@github.com:/acme/tool", GITHUB),
        ("git@github.com:acme/tool/", GITHUB),
        ("https://github.com/acme/tool.github.io", "https://github.com/acme/tool.github.io"),
        ("https://github.com/acme/.github", "https://github.com/acme/.github"),
        ("https://gitlab.com/acme/tool.git", GITLAB),
        ("git@gitlab.com:acme/tool.git", GITLAB),
        ("https://gitlab.com/acme/group/sub/tool.git", "https://gitlab.com/acme/group/sub/tool"),
        ("git@gitlab.com:acme/group/sub/tool.git", "https://gitlab.com/acme/group/sub/tool"),
        ("https://bitbucket.org/acme/tool.git", BITBUCKET),
        ("https://user@bitbucket.org/acme/tool.git", BITBUCKET),
        ("ssh://git@bitbucket.org/acme/tool.git", BITBUCKET),
        ("git@bitbucket.org:acme/tool.git", BITBUCKET),
    ],
)
def test_an_address_of_a_known_host_becomes_its_page(address: str, page: str) -> None:
    assert repo_url(address) == page


@pytest.mark.parametrize(
    "address",
    [
        None,
        "",
        "   ",
        "tool",
        "/srv/git/tool.git",
        "file:///srv/git/tool.git",
        "https://github.com",
        "https://github.com/",
        "https://github.com/acme",
        "https://github.com/acme/",
        "https://github.com//acme",
        "https://github.com/acme/..",
        "https://github.com/acme/../evil",
        "https://github.com/./tool",
        "https://github.com.evil.com/acme/tool",
        "https://evilgithub.com/acme/tool",
        "https://evil.com/github.com/acme/tool",
        "https://evil.com/?github.com/acme/tool",
        "https://evil.com#github.com/acme/tool",
        "https://github.com@evil.com/acme/tool",
        "https://github.com:pass@evil.com/acme/tool",
        "https://evil.com\\@github.com/acme/tool\\..",
        "https://www.github.com/acme/tool",
        "https://gist.github.com/acme/tool",
        "https://github.co/acme/tool",
        "https://github.com./acme/tool",
        "https://xgitlab.com/acme/tool",
        "https://gitlab.com.example.org/acme/tool",
        "https://gitlab.example.org/acme/tool",
        "https://bitbucket.org.example.com/acme/tool",
        "git@github.com.evil.com:acme/tool.git",
        "git@evilgithub.com:acme/tool.git",
        "git@evil.com:github.com/acme/tool.git",
        "ssh://git@evil.com/github.com/acme/tool",
        "ssh://github.com@evil.com/acme/tool",
        "javascript://github.com/acme/tool",
        "https://github.com/acme/tool?x=<script>",
        "https://github.com/acme/tool#readme",
        'https://github.com/acme/"onmouseover="x',
        "https://github.com/acme/to ol",
        "https://github.com/acme/tool\nhttps://evil.com/a/b",
        "https://github.com/acme/tööl",
        "https://gіthub.com/acme/tool",
    ],
)
def test_any_other_address_gives_nothing(address: str | None) -> None:
    assert repo_url(address) is None
    assert commit_url(address, HASH) is None


@pytest.mark.parametrize(
    ("address", "page"),
    [
        ("git@github.com:acme/tool.git", f"{GITHUB}/commit/{HASH}"),
        ("git@gitlab.com:acme/tool.git", f"{GITLAB}/-/commit/{HASH}"),
        ("https://gitlab.com/acme/group/sub/tool", f"https://gitlab.com/acme/group/sub/tool/-/commit/{HASH}"),
        ("git@bitbucket.org:acme/tool.git", f"{BITBUCKET}/commits/{HASH}"),
    ],
)
def test_each_host_has_its_own_path_to_a_commit(address: str, page: str) -> None:
    assert commit_url(address, HASH) == page


@pytest.mark.parametrize(
    "commit", [None, "", "abc123", "HEAD", "main", f"{HASH}/../x", f"{HASH}\n", "g" * 40, "a" * 65]
)
def test_what_is_no_hash_gives_no_page(commit: str | None) -> None:
    assert commit_url(GITHUB, commit) is None


@pytest.mark.parametrize("commit", ["abc1234", "ABC1234", HASH, "a" * 64])
def test_short_and_long_hashes_are_kept_as_they_are(commit: str) -> None:
    assert commit_url(GITHUB, commit) == f"{GITHUB}/commit/{commit}"


SCHEMES = ("https://", "http://", "ssh://", "git@", "javascript:", "//", "")
HOSTS = ("github.com", "gitlab.com", "bitbucket.org", "evil.com", "github.com.evil.com", "user:pw@github.com")
ADDRESSES = st.tuples(st.sampled_from(SCHEMES), st.sampled_from(HOSTS), st.text("/:.@#?\\ ab\t\nä", max_size=20))


@given(st.one_of(st.text(), ADDRESSES.map("".join)))
def test_a_page_is_always_on_a_known_host_and_its_own_page(address: str) -> None:
    page = repo_url(address)
    if page is None:
        return
    assert page.startswith(("https://github.com/", "https://gitlab.com/", "https://bitbucket.org/"))
    assert page.isascii()
    assert page.isprintable()
    assert not set(page) & set(" <>\"'\\?#@")
    assert "/../" not in f"{page}/"
    assert repo_url(page) == page


@pytest.mark.parametrize("address", ["https://" + "a" * 10**6 + "!", "git@" + "a." * 10**6, "https://" + "a:" * 490])
def test_a_long_text_that_is_no_address_is_given_up_at_once(address: str) -> None:
    started = time.thread_time()
    assert repo_url(address) is None
    assert time.thread_time() - started < 0.2


@pytest.mark.parametrize(
    ("address", "kept"),
    [
        ("https://user:s3cret@example.com/acme/site.git", "https://example.com/acme/site.git"),
        ("https://s3cret@example.com/acme/site.git", "https://example.com/acme/site.git"),
        ("https://s3cret:x-oauth-basic@example.com/acme/site", "https://example.com/acme/site"),
        ("https://:s3cret@example.com/acme/site", "https://example.com/acme/site"),
        ("HTTPS://user:s3cret@Example.com/acme/site", "https://Example.com/acme/site"),
        ("http://user:s3cret@example.com:8080/acme/site", "http://example.com:8080/acme/site"),
        ("https://user:s3cret@[::1]:8443/acme/site", "https://[::1]:8443/acme/site"),
        ("https://user:s3c@s3cret@example.com/acme/site", "https://example.com/acme/site"),
        ("https://user:s3c/s3cret@example.com/acme/site", "https://example.com/acme/site"),
        ("https://user:12/s3cret@example.com/acme/site", "https://example.com/acme/site"),
        ("https://user:s3c#s3cret@example.com/acme/site", "https://example.com/acme/site"),
        ("https://user:s3c?s3cret@example.com/acme/site?x=1", "https://example.com/acme/site"),
        ("https:////user:s3cret@example.com/acme/site", "https://example.com/acme/site"),
        ("  https://user:s3cret@example.com/acme/site\n", "https://example.com/acme/site"),
        ("ssh://user:s3cret@example.com/acme/site.git", "ssh://example.com/acme/site.git"),
        ("ssh://git:s3cret@example.com:22/acme/site.git", "ssh://git@example.com:22/acme/site.git"),
        ("SSH://git@example.com/acme/site.git", "ssh://git@example.com/acme/site.git"),
        ("ssh://git@example.com:acme/site.git", "ssh://git@example.com:acme/site.git"),
        ("git+ssh://git@example.com/acme/site.git", "git+ssh://git@example.com/acme/site.git"),
        ("git+https://user:s3cret@example.com/acme/site.git", "git+https://example.com/acme/site.git"),
        ("ftp://user:s3cret@example.com/acme/site.git", "ftp://example.com/acme/site.git"),
        ("git://user:s3cret@example.com/acme/site.git", "git://example.com/acme/site.git"),
        ("https://example.com/acme/site?access_token=s3cret", "https://example.com/acme/site"),
        ("https://example.com/acme/site&access_token=s3cret", "https://example.com/acme/site"),
        ("https://example.com/acme/site;token=s3cret", "https://example.com/acme/site"),
        ("https://example.com/acme/site#s3cret", "https://example.com/acme/site"),
        ("git@example.com:acme/site.git", "git@example.com:acme/site.git"),
        ("git@example.com:acme/site.git?token=s3cret", "git@example.com:acme/site.git"),
        ("s3cret@example.com:acme/site.git", "example.com:acme/site.git"),
        ("user:s3cret@example.com:acme/site.git", "example.com:acme/site.git"),
        ("example.com/acme/site?token=s3cret", "example.com/acme/site"),
        ("/srv/git/site.git", "/srv/git/site.git"),
        ("/home/me@corp/site", "/home/me@corp/site"),
        ("C:\\src\\site", "C:\\src\\site"),
        ("file:///srv/git/site.git", "file:///srv/git/site.git"),
        ("acme/site", "acme/site"),
        ("the site (old)", "the site (old)"),
        ("  '; DROP TABLE agent_runs; --\r\n", "  '; DROP TABLE agent_runs; --\r\n"),
        ("example.com/acme/site;token=s3cret", "example.com/acme/site"),
        ("", ""),
    ],
)
def test_only_host_and_path_of_an_address_are_kept(address: str, kept: str) -> None:
    assert without_credentials(address) == kept
    assert without_credentials(kept) == kept


@pytest.mark.parametrize(
    "address",
    [
        "user:s3cret@example.com/acme/site",
        "//user:s3cret@example.com/acme/site",
        "https:user:s3cret@example.com/acme/site",
        "https:/user:s3cret@example.com/acme/site",
        "https:\\\\user:s3cret@example.com\\acme",
        "https://user:s3cret",
        "https://user:s3cret@",
        "https://example.com/acme/token=s3cret",
        "https://example.com/acme/site%3Ftoken%3Ds3cret",
        "https://user/s3c?s3cret@example.com/acme/site",
        "https://user:s3cret@example.com\nhttps://other.example",
        "git clone https://user:s3cret@example.com/acme/site",
        "url = https://user:s3cret@example.com/acme/site",
        "git@example.com:acme/site@s3cret",
        "token=s3cret",
        "example.com/acme/site,token=s3cret",
        "git@example.com:acme/token=s3cret",
    ],
)
def test_of_an_address_in_which_a_secret_cannot_be_distinguished_from_the_rest_nothing_is_kept(address: str) -> None:
    assert without_credentials(address) is None


SECRETS = st.text("AZaz09-._~!$&'()*+,;=:@/?#[]%\\ \"ä", max_size=8).map("s3c{}ret".format)
SCHEMES_OF_GIT = st.sampled_from(["https", "HTTP", "ssh", "git", "ftp", "ftps", "git+https", "git+ssh", "svn+ssh"])


@given(
    SCHEMES_OF_GIT, st.sampled_from(["", "user:", "git:", "user@corp:", ":"]), SECRETS, st.sampled_from(["", "?x=1"])
)
def test_no_password_is_kept(scheme: str, user: str, secret: str, rest: str) -> None:
    kept = without_credentials(f"{scheme}://{user}{secret}@example.com/acme/site.git{rest}")
    assert kept in (
        None,
        f"{scheme.lower()}://example.com/acme/site.git",
        f"{scheme.lower()}://git@example.com/acme/site.git",
    )


@given(
    st.sampled_from(["https://user:pw@example.com", "https://example.com", "git@example.com:x", "example.com"]), SECRETS
)
def test_no_part_of_a_query_or_a_fragment_is_kept(start: str, secret: str) -> None:
    for mark in ("?access_token=", "#", "?", "&token=", ";token=", "?x=1#", "?token=%"):
        kept = without_credentials(f"{start}/acme/site{mark}{secret}")
        assert kept is None or not set(kept.replace("acme/site", "")) & set("3"), kept


@given(st.one_of(st.text(), ADDRESSES.map("".join)))
def test_what_is_kept_stays_as_it_is(address: str) -> None:
    kept = without_credentials(address)
    assert kept is None or without_credentials(kept) == kept
    assert kept is None or repo_url(kept) == repo_url(address) or "@" in address or repo_url(address) is None
