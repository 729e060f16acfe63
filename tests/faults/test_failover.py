"""Servers, daemons and etcd are killed, frozen and switched over: what two daemons acknowledged is there, once."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import aiohttp
import pytest
from pydantic import SecretStr

from telemetryd.engine.postgres.connection import Target, connect_plainly, reading_session, writing_session
from telemetryd.settings import Settings
from tests.conftest import Daemon, Row, StartDaemon, choose_port, eventually
from tests.event_stream import Reader, events_of
from tests.faults import patroni
from tests.faults.conftest import Rounds
from tests.faults.ledger import Ledger
from tests.faults.load import Client, Contents, Load, count_server_errors, read_postgres
from tests.faults.patroni import Node, PatroniCluster
from tests.needs import give_up, require_program
from tests.postgres_cluster import PACKAGE, binaries
from tests.tools.process import telemetryd

pytestmark = [pytest.mark.failover, pytest.mark.slow]

_DAEMONS: Final = 2
_FREEZE_S: Final = 25.0
"""Longer than the cluster waits for a primary (`ttl`)."""
_STOP_S: Final = 15.0
"""Longer than a daemon may hold a transaction open."""
_BETWEEN_S: Final = 2.0
_RESTART_S: Final = 2.0
_SERVED_AGAIN_S: Final = 300.0


@pytest.fixture(scope="module")
def patroni_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Python with Patroni, where the user of the servers may read it."""
    require_program("etcd", "etcd-server")
    if binaries() is None:
        give_up(f"PostgreSQL is needed, which is missing: apt-get install {PACKAGE}")
    with patroni.installed() as python:
        yield python


class Service:
    """The daemons, and the clients that send to them.

    Args:
        start: starts a daemon.
        cluster: what they run on.
        load: the clients.

    """

    def __init__(self, start: StartDaemon, cluster: PatroniCluster, load: Load) -> None:
        self._start, self.cluster, self.load = start, cluster, load
        self._ports = [choose_port() for _ in range(_DAEMONS)]
        self.daemons = [self.start(number) for number in range(_DAEMONS)]
        self.is_over = False
        self.answers: list[float] = []
        """When each request was answered."""
        self.begun: list[Daemon] = [*self.daemons]
        self.faults: list[str] = []
        """What daemons said that is no sentence."""
        self.ends: list[str] = []
        """With what daemons ended that nobody killed."""

    def start(self, number: int) -> Daemon:
        """Start a daemon, at the place that it always has."""
        folder = self.cluster.folder / f"daemon{number}"
        folder.mkdir(exist_ok=True)
        return self._start(
            folder=folder,
            TELEMETRY_DB_URL=self.cluster.url,
            TELEMETRY_API_PORT=str(self._ports[number]),
            TELEMETRY_DB_COMMIT_TIMEOUT_S="10",
        )

    async def supervise(self, number: int) -> None:
        """Start a daemon again whenever it has ended, as systemd does."""
        while True:
            await asyncio.sleep(_RESTART_S)
            if (status := self.daemons[number].process.poll()) is None:
                continue
            said = self.daemons[number].wait()[1].splitlines()
            if status != -signal.SIGKILL:
                self.ends.append(f"{status}: {said}")
                if not (len(said) == 1 and said[0].startswith("telemetryd: ")):
                    self.faults.append(f"a daemon ended with {self.ends[-1]}")
            self.daemons[number] = self.start(number)
            self.begun.append(self.daemons[number])

    def said(self) -> str:
        """Return the last words of every daemon."""
        return "\n".join(f"{daemon.process.pid}: {daemon.raw[-3:]}" for daemon in self.begun[-6:]) + f"\n{self.ends}"

    @property
    def urls(self) -> list[str]:
        """Where the daemons are, whether they are there or not."""
        return [f"http://127.0.0.1:{port}" for port in self._ports]

    async def send(self, client: Client) -> None:
        """Let a client send to one daemon until it fails, then repeat at the next one, until all is over."""
        place = client.number
        known = 0

        def go_on() -> bool:
            nonlocal known
            if len(client.answered) > known:
                known = len(client.answered)
                self.answers.append(time.monotonic())
            return not self.is_over

        while not self.is_over:
            # A client that gave up waiting for a frozen daemon could not know when that does what it was sent.
            timeout = aiohttp.ClientTimeout(None)
            async with aiohttp.ClientSession(self.urls[place % _DAEMONS], timeout=timeout) as session:
                await client.run(session, go_on)
            client.is_unsure = client.pending is not None
            place += 1
            await asyncio.sleep(0.1)

    async def settle(self, client: Client) -> None:
        """Repeat what has no answer yet until it has one, as clients do."""
        place = client.number
        while client.pending is not None:
            async with aiohttp.ClientSession(self.urls[place % _DAEMONS]) as session:
                await client.run(session, lambda: client.pending is not None)
            client.is_unsure = True
            place += 1
            await asyncio.sleep(0.1)

    async def served(self) -> None:
        """Wait until both daemons have stored something that was sent after this."""
        since = len(self.answers)
        await eventually(lambda: len(self.answers) > since + 5 * len(self.load.clients), _SERVED_AGAIN_S)
        async with aiohttp.ClientSession() as session:
            for url in self.urls:
                await eventually(lambda url=url: _is_healthy(session, url), _SERVED_AGAIN_S)  # type: ignore[misc]

    def longest_gap(self, since: float) -> float:
        """Return for how long nothing was acknowledged at most, from a moment on."""
        times = [since, *(moment for moment in self.answers if moment >= since), time.monotonic()]
        return max(after - before for before, after in itertools.pairwise(times))


async def _is_healthy(session: aiohttp.ClientSession, url: str) -> bool:
    with contextlib.suppress(aiohttp.ClientError):
        async with session.get(f"{url}/health") as answer:
            return answer.status == 200
    return False


@dataclass
class Follower:
    """A subscriber that goes on at the other daemon, after the last id it was given, whenever a stream ends."""

    copy: dict[str, str] = field(default_factory=dict)
    """When each run that it knows of was changed last, by event_id."""
    faults: list[str] = field(default_factory=list)
    reconnected: int = 0

    async def run(self, urls: list[str]) -> None:
        """Follow for ever."""
        last, place = "0", 0
        while True:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError, ConnectionError):
                # Every 15 seconds something comes.
                timeout = aiohttp.ClientTimeout(None, sock_read=40)
                reader = Reader()
                async with (
                    aiohttp.ClientSession(urls[place % len(urls)], timeout=timeout) as session,
                    session.get("/api/v1/runs/stream", headers={"Last-Event-ID": last}) as answer,
                ):
                    async for sent in events_of(answer, reader):
                        self._take(sent.event, sent.data, last, sent.id)
                        last = sent.id
            place += 1
            self.reconnected += 1
            await asyncio.sleep(0.1)

    def _take(self, event: str, run: Row, last: str, new: str) -> None:
        epoch, _, before = last.rpartition("-")
        again, _, number = new.rpartition("-")
        if event != "run":
            self.faults.append(f"{event} {run} after {last}")
        elif (epoch and epoch != again) or int(number) <= int(before):
            self.faults.append(f"{new} after {last}")
        else:
            self.copy[run["event_id"]] = run["updated_at"]


# --- What is done to them ------------------------------------------------------------------------


async def kill_postmaster(service: Service, _: random.Random) -> None:
    """The process of which all sessions are children."""
    os.kill(service.cluster.need_primary().postmaster(), signal.SIGKILL)


async def kill_primary(service: Service, _: random.Random) -> None:
    """The whole server, as if the machine lost its power."""
    await kill_node(service, service.cluster.need_primary())


async def kill_standby(service: Service, chance: random.Random) -> None:
    """One of those that a commit may wait for."""
    await kill_node(service, chance.choice(service.cluster.standbys()))


async def kill_node(service: Service, node: Node) -> None:
    await asyncio.to_thread(node.kill)
    await service.served()
    service.cluster.start_node(node)


async def kill_both_standbys(service: Service, _: random.Random) -> None:
    """Then nothing may be acknowledged, until one is back."""
    standbys = service.cluster.standbys()
    for node in standbys:
        await asyncio.to_thread(node.kill)
    await asyncio.sleep(1)  # what was on its way to a client
    before = len(service.answers)
    await asyncio.sleep(5)
    assert len(service.answers) == before, "acknowledged, and no standby holds it"
    for node in standbys:
        service.cluster.start_node(node)


async def freeze_primary(service: Service, _: random.Random) -> None:
    """A server that stands still until another one leads, and then goes on as if nothing had been."""
    node = service.cluster.need_primary()
    node.signal(signal.SIGSTOP)
    try:
        await asyncio.sleep(_FREEZE_S)
        await service.served()
    finally:
        node.signal(signal.SIGCONT)


async def switch_over(service: Service, _: random.Random) -> None:
    """A planned change."""
    await asyncio.to_thread(service.cluster.switch_over)


async def kill_daemon(service: Service, chance: random.Random) -> None:
    """One of the two."""
    chance.choice(service.daemons).process.kill()


async def kill_all(service: Service, _: random.Random) -> None:
    """Both daemons and the primary at once: nobody remembers what was committed last."""
    node = service.cluster.need_primary()
    for daemon in service.daemons:
        daemon.process.kill()
    await kill_node(service, node)


async def freeze_daemon(service: Service, chance: random.Random) -> None:
    """One that may hold a lock that the other one needs."""
    daemon = chance.choice(service.daemons)
    daemon.process.send_signal(signal.SIGSTOP)
    try:
        await asyncio.sleep(_STOP_S)
    finally:
        daemon.process.send_signal(signal.SIGCONT)


async def freeze_etcd(service: Service, _: random.Random) -> None:
    """Without it no server may lead."""
    etcd = service.cluster.etcd
    assert etcd is not None
    etcd.send_signal(signal.SIGSTOP)
    try:
        await asyncio.sleep(_FREEZE_S)
    finally:
        etcd.send_signal(signal.SIGCONT)


_FAULTS: Final[Mapping[str, Callable[[Service, random.Random], Awaitable[None]]]] = {
    "kill -9 of the postmaster": kill_postmaster,
    "kill -9 of the primary's machine": kill_primary,
    "kill -9 of a daemon": kill_daemon,
    "SIGSTOP of the primary's machine": freeze_primary,
    "SIGSTOP of a daemon": freeze_daemon,
    "switchover": switch_over,
    "kill -9 of a standby's machine": kill_standby,
    "kill -9 of both standbys": kill_both_standbys,
    "kill -9 of both daemons and the primary": kill_all,
    "SIGSTOP of etcd": freeze_etcd,
}


# --- The rounds ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Round:
    """What one round did."""

    fault: str
    gap_s: float
    acknowledged: int


async def go_through(service: Service, faults: list[str], chance: random.Random, done: list[Round]) -> None:
    """Do one thing after the other, and note each round; in between everything is healthy again."""
    for fault in faults:
        await service.served()
        await asyncio.to_thread(service.cluster.until_whole)
        await asyncio.sleep(_BETWEEN_S * chance.random())
        since, before = time.monotonic(), len(service.answers)
        await _FAULTS[fault](service, chance)
        await service.served()
        done.append(Round(fault, service.longest_gap(since), len(service.answers) - before))
    await asyncio.to_thread(service.cluster.until_whole)


def look(cluster: PatroniCluster) -> Contents:
    """Read the database at its primary."""
    target = Target.of(Settings(db_url=SecretStr(cluster.url)))
    with contextlib.closing(connect_plainly(target, "test", writing_session(target))) as plain:
        return read_postgres(plain)


def changed(cluster: PatroniCluster) -> dict[str, str]:
    """Return when each run was changed last."""
    target = Target.of(Settings(db_url=SecretStr(cluster.url)))
    with contextlib.closing(connect_plainly(target, "test", reading_session(60))) as plain:
        return dict(plain.execute("SELECT event_id, updated_at FROM agent_runs").fetchall())


@pytest.mark.parametrize("mode", ["quorum", "true"])
async def test_failover(
    start_daemon: StartDaemon, patroni_python: Path, rounds: Rounds, ledger: Ledger, mode: str
) -> None:
    seed = random.randrange(1 << 30)
    chance = random.Random(seed)
    full = rounds(12, least=2)
    order = chance.sample([*_FAULTS], len(_FAULTS))
    faults = [order[number % len(order)] for number in range(full)]
    with patroni.running(patroni_python, mode) as cluster:
        service = Service(start_daemon, cluster, Load(seed))
        follower = Follower()
        supervising = [asyncio.create_task(service.supervise(number)) for number in range(_DAEMONS)]
        following = asyncio.create_task(follower.run(service.urls))
        sending = [asyncio.create_task(service.send(client)) for client in service.load.clients]
        done: list[Round] = []
        try:
            await go_through(service, faults, chance, done)
        except AssertionError as error:
            error.add_note(f"{mode}, seed {seed}, {faults[len(done) :][:1]} after {done}; {service.said()}")
            raise
        service.is_over = True
        await asyncio.gather(*sending)
        await asyncio.gather(*map(service.settle, service.load.clients))
        expected = changed(cluster)
        await eventually(lambda: follower.copy == expected)
        for task in (following, *supervising):
            task.cancel()
        findings = service.load.check(look(cluster))
        telemetryd("check", TELEMETRY_DB_URL=cluster.url)
    for fault in [*follower.faults, *service.faults]:
        findings.note("unrecovered", fault)
    for daemon in service.begun:
        daemon.close()
    acknowledged = sum(client.stored for client in service.load.clients)
    ledger.tell(f"synchronous_mode: {mode}, seed {seed}, the subscriber connected {follower.reconnected + 1} times")
    for number, one in enumerate(done, 1):
        ledger.tell(f"{number:>4} {one.fault:<45} {one.gap_s:6.1f} s without service, {one.acknowledged:,} requests")
    ledger.record(
        fault="PostgreSQL under Patroni: servers, daemons and etcd killed, frozen, switched over",
        mode=f"synchronous_mode: {mode}",
        rounds=full,
        acknowledged=acknowledged,
        server_errors=sum(count_server_errors(daemon.lines) for daemon in service.begun),
        **findings.figures(),
    )
