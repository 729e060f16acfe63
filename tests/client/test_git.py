"""What is said of the checkout around a folder, whatever its files hold."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from telemetryd.client.git import git_fields
from tests.client.conftest import git

HASH = "a" * 40


@pytest.fixture(autouse=True)
def _outside_of_git(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GIT_DIR", "GIT_COMMON_DIR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A checkout of `main` that git has not touched."""
    folder = tmp_path / "repository"
    for name in ("refs/heads", "objects"):
        (folder / ".git" / name).mkdir(parents=True)
    (folder / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
    (folder / ".git" / "refs/heads/main").write_text(f"{HASH}\n")
    configure(folder, '[remote "origin"]\n\turl = https://example.com/acme/site.git\n')
    return folder


def configure(folder: Path, text: str | bytes) -> None:
    (folder / ".git" / "config").write_bytes(text.encode() if isinstance(text, str) else text)


KNOWN = {"git_repo": "https://example.com/acme/site.git", "git_branch": "main", "git_commit_hash": HASH}


def test_git_is_read_from_a_folder_inside_a_checkout(checkout: Path) -> None:
    inside = checkout / "a" / "b"
    inside.mkdir(parents=True)
    assert git_fields(inside) == {
        "git_repo": "https://example.com/acme/site.git",
        "git_branch": "main",
        "git_commit_hash": git(checkout, "rev-parse", "HEAD"),
    }


def test_packed_references_worktrees_and_detached_heads(checkout: Path, tmp_path: Path) -> None:
    commit = git(checkout, "rev-parse", "HEAD")
    git(checkout, "branch", "feature/x")
    git(checkout, "pack-refs", "--all")
    assert git_fields(checkout)["git_commit_hash"] == commit
    git(checkout, "worktree", "add", "-q", str(tmp_path / "other"), "feature/x")
    assert git_fields(tmp_path / "other") == {**git_fields(checkout), "git_branch": "feature/x"}
    git(checkout, "checkout", "-q", "--detach")
    assert "git_branch" not in git_fields(checkout)
    assert git_fields(checkout)["git_commit_hash"] == commit


def test_no_checkout_and_broken_ones_give_nothing(tmp_path: Path) -> None:
    assert git_fields(tmp_path) == {}
    (tmp_path / ".git").mkdir()
    assert git_fields(tmp_path) == {}
    (tmp_path / ".git" / "HEAD").write_bytes(b"\xff\xfe")
    assert git_fields(tmp_path) == {}
    (tmp_path / ".git" / "HEAD").write_text("ref: refs/heads/unborn\n")
    assert git_fields(tmp_path) == {"git_branch": "unborn"}


def test_bytes_that_are_no_utf_8_cost_nothing_but_themselves(repository: Path) -> None:
    config = (repository / ".git" / "config").read_bytes()
    configure(repository, b"[user]\n\tname = Ren\xe9\n" + config)
    assert git_fields(repository) == KNOWN
    configure(repository, b'[remote "origin"]\n\turl = /srv/Ren\xe9.git\n')
    assert git_fields(repository)["git_repo"] == "/srv/Ren\N{REPLACEMENT CHARACTER}.git"
    git_folder = os.fsencode(repository / ".git")
    with open(git_folder + b"/refs/heads/Ren\xe9", "w") as file:
        file.write(HASH)
    (repository / ".git" / "HEAD").write_bytes(b"ref: refs/heads/Ren\xe9\n")
    assert git_fields(repository)["git_branch"] == "Ren\N{REPLACEMENT CHARACTER}"
    assert git_fields(repository)["git_commit_hash"] == HASH


def test_the_config_costs_only_the_address(repository: Path) -> None:
    (repository / ".git" / "config").unlink()
    (repository / ".git" / "config").mkdir()
    assert git_fields(repository) == {name: KNOWN[name] for name in ("git_branch", "git_commit_hash")}
    (repository / ".git" / "config").rmdir()
    os.mkfifo(repository / ".git" / "config")
    assert git_fields(repository) == {name: KNOWN[name] for name in ("git_branch", "git_commit_hash")}


@pytest.mark.parametrize(
    ("head", "told"),
    [
        ("ref: refs/heads/.invalid\n", (None, None)),
        ("ref: refs/heads/alias\n", ("alias", HASH)),
        ("ref: refs/heads/circle\n", ("circle", None)),
        ("ref: refs/heads/packed/one\n", ("packed/one", "b" * 64)),
        ("ref: refs/heads/unborn\n", ("unborn", None)),
        ("ref: ../secret\n", (None, None)),
        ("ref: refs/remotes/origin/main\r\n", (None, "c" * 40)),
        ("b" * 64 + "\n", (None, "b" * 64)),
        ("garbage", (None, None)),
        ("x" * 100_000, (None, None)),
    ],
    ids=lambda value: value.strip()[:40] if isinstance(value, str) else None,
)
def test_a_head_of_any_kind(repository: Path, head: str, told: tuple[str | None, str | None]) -> None:
    folder = repository / ".git"
    (folder / "secret").write_text(HASH)
    (folder / "refs/heads/alias").write_text("ref: refs/heads/main\n")
    (folder / "refs/heads/circle").write_text("ref: refs/heads/circle\n")
    packed = (
        f"# pack-refs with: peeled\n{'c' * 40} refs/remotes/origin/main\n{'b' * 64} refs/heads/packed/one\n^{HASH}\n"
    )
    (folder / "packed-refs").write_text(packed)
    (folder / "HEAD").write_text(head)
    fields = git_fields(repository)
    assert (fields.get("git_branch"), fields.get("git_commit_hash")) == told
    assert fields["git_repo"] == KNOWN["git_repo"]


def test_a_head_that_is_a_link(repository: Path) -> None:
    (repository / ".git" / "HEAD").unlink()
    (repository / ".git" / "HEAD").symlink_to("refs/heads/main")
    assert git_fields(repository) == KNOWN


@pytest.mark.parametrize(
    ("config", "address"),
    [
        ('[Remote "origin"] URL = "https://example.com/a b" # ours\n', None),
        ('[remote "origin"]\n url = "https://example.com/acme/\\\n  site"; ours\n', None),
        ('[remote "origin"]\n url = "https://example.com/acme/\\\nsite"; ours\n', "https://example.com/acme/site"),
        ("[remote.origin]\nurl=https://example.com/acme/site#x\n", "https://example.com/acme/site"),
        ('[remote "fork"]\nurl = git@example.com:fork.git\n[remote "b"]\nurl = x\n', "git@example.com:fork.git"),
        ('[url "https://u:s3cret@example.com/"]\ninsteadOf = gh:\n[remote "origin"]\nurl = gh:acme/site\n',
         "https://example.com/acme/site"),
        ("[include]\npath = ../more\n", "https://example.com/included"),
        ("[include]\npath = config\n", None),
        ('[remote "origin"]\nurl = https://u:s3cret@example.com/acme/site?token=s3cret\n', "https://example.com/acme/site"),
        ("[core\nurl = x\n[remote]\nurl\n", None),
    ],
    ids=["section", "blanks", "continued", "dotted", "first", "instead", "include", "circle", "credentials", "broken"],
)  # fmt: skip
def test_the_address_is_read_as_git_reads_it(repository: Path, config: str, address: str | None) -> None:
    (repository / "more").write_text('[remote "origin"]\n\turl = https://example.com/included\n')
    configure(repository, config)
    assert git_fields(repository).get("git_repo") == address


def test_a_submodule_and_a_repository_without_a_checkout(repository: Path, tmp_path: Path) -> None:
    inside = tmp_path / "super" / "part"
    inside.mkdir(parents=True)
    (inside / ".git").write_text("gitdir: ../../repository/.git\r\n")
    assert git_fields(inside) == KNOWN
    assert git_fields(repository / ".git" / "objects") == KNOWN


def test_the_variables_of_git_win(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_DIR", "repository/.git")
    assert git_fields(tmp_path) == KNOWN
    monkeypatch.setenv("GIT_DIR", "nowhere")
    assert git_fields(repository) == {}


def test_a_folder_that_we_may_not_look_into_costs_only_what_is_in_it(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError(path)

    monkeypatch.setattr(Path, "is_dir", refuse)
    assert git_fields(repository) == {}
