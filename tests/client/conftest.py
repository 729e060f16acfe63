"""Clients with a folder of their own, in front of the real app or behind a bad proxy."""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from telemetryd.client import Client
from telemetryd.client.config import USUAL, Pace
from tests.conftest import PATIENCE_S, Api
from tests.needs import require_program
from tests.tools.bad_proxy import BadProxy, bad_proxy

MakeClient = Callable[..., Client]


@pytest.fixture
def buffer(tmp_path: Path) -> Path:
    return tmp_path / "buffer"


@pytest.fixture
def pace() -> Pace:
    """How often clients try and look; a file whose tests would have to wait has another one."""
    return USUAL


@pytest.fixture
def make_client(buffer: Path, pace: Pace) -> Iterator[MakeClient]:
    """Return a function that makes a client; keyword arguments are settings."""
    made: list[Client] = []

    def make(url: str = "http://127.0.0.1:9", **settings: Any) -> Client:
        given = {"buffer_dir": buffer, "linger_s": 0.01, "flush_timeout_s": 0.5, "pace": pace, **settings}
        made.append(Client(url, **given))
        return made[-1]

    yield make
    for client in made:
        client.close()


def url_of(api: Api) -> str:
    return str(api.client.make_url("/")).rstrip("/")


async def flushed(client: Client, timeout_s: float = PATIENCE_S) -> None:
    """Wait for the client without holding up the app, which runs on this very loop."""
    assert await asyncio.to_thread(client.flush, timeout_s), client.stats()


async def stored(api: Api, wanted: int, timeout_s: float = PATIENCE_S, **headers: str) -> None:
    """Wait until the daemon has so many runs."""
    deadline = time.monotonic() + timeout_s
    while len(await api.get("/api/v1/runs?limit=1000", headers=headers)) < wanted:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


@pytest.fixture
async def proxy(api: Api) -> AsyncIterator[BadProxy]:
    with bad_proxy(url_of(api)) as bad:
        yield bad


def states(buffer: Path) -> dict[str, int]:
    """Return how many files of each state a buffer folder holds."""
    counts: dict[str, int] = {}
    for path in buffer.iterdir():
        counts[path.suffix] = counts.get(path.suffix, 0) + 1
    return counts


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=folder, env=environment, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    require_program("git", "git")
    folder = tmp_path / "checkout"
    folder.mkdir()
    git(folder, "init", "-q")
    git(folder, "commit", "-q", "--allow-empty", "-m", "first")
    git(folder, "remote", "add", "fork", "https://example.com/fork.git")
    git(folder, "remote", "add", "origin", "https://user:secret@example.com/acme/site.git")
    return folder
