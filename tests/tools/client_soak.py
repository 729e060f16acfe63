"""Kills and restarts agents and their daemon at random, and counts what was promised, stored, lost and stored twice.

python -m tests.tools.client_soak --minutes 10
"""

from __future__ import annotations

import contextlib
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import click

from tests.conftest import Daemon, choose_port
from tests.faults.load import count_server_errors, damage
from tests.tools.process import telemetryd


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of it."""

    promised: int
    """Runs whose last call had returned before the agent was killed."""
    stored: int
    """Runs in the database; more than promised, if agents were killed between the call and their note of it."""
    lost: set[str]
    """Promised and not stored, or stored without the end or the event that were promised with them."""
    twice: int
    """Runs or events that are stored more than once."""
    left: int
    """Files of the buffer folder that are neither sent nor empty of news."""
    agent_kills: int
    daemon_kills: int
    damage: tuple[str, ...]
    """What is wrong with the database in itself."""
    server_errors: int
    """5xx answers other than the documented 503, by the daemon's log."""

    def __str__(self) -> str:
        return (
            f"sent {self.promised}, stored {self.stored}, lost {len(self.lost)}, twice {self.twice}, "
            f"unsent files left {self.left}, unrecovered {len(self.damage)}, 5xx {self.server_errors} "
            f"({self.agent_kills} agents and {self.daemon_kills} daemons killed)"
        )


class Soak:
    """Agents and a daemon in a folder.

    Args:
        folder: for the database, the buffer folder and the journals.
        agents: how many agents run at a time.
        pause_s: how long an agent rests after each 20 runs.
        seed: of the moments of death.

    """

    def __init__(self, folder: Path, agents: int = 2, pause_s: float = 0.02, seed: int | None = None) -> None:
        self._folder = folder
        self.buffer = folder / "buffer"
        self._journals = folder / "journals"
        self._journals.mkdir()
        self._pause_s = pause_s
        self._random = random.Random(seed)
        self._port = choose_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self._started = 0
        self.agent_kills = self.daemon_kills = self._server_errors = 0
        self._daemon: Daemon | None = None
        self._agents = [self._start_agent() for _ in range(agents)]

    def _start_agent(self) -> subprocess.Popen[bytes]:
        self._started += 1
        journal = self._journals / str(self._started)
        arguments = [self.url, str(self.buffer), str(journal), str(self._pause_s)]
        log = (self._folder / "agents.log").open("ab")
        with log:
            return subprocess.Popen([sys.executable, "-m", "tests.tools.agent", *arguments], stderr=log)

    def kill_agent(self) -> None:
        """Kill one agent and start another in its place."""
        index = self._random.randrange(len(self._agents))
        self._agents[index].kill()
        self._agents[index].wait()
        self.agent_kills += 1
        self._agents[index] = self._start_agent()

    def start_daemon(self) -> None:
        """Start the daemon if it does not run."""
        if self._daemon is None:
            self._daemon = Daemon(self._folder, TELEMETRY_API_PORT=str(self._port), TELEMETRY_DB_JOURNAL_MODE="WAL")

    def kill_daemon(self) -> None:
        """Kill the daemon if it runs."""
        if self._daemon is not None:
            self._daemon.stop(signal.SIGKILL)
            self._read_log(self._daemon)
            self._daemon.close()
            self._daemon = None
            self.daemon_kills += 1

    def _read_log(self, daemon: Daemon) -> None:
        self._server_errors += count_server_errors(daemon.lines)

    def disturb(self) -> None:
        """Let something happen, and some time pass."""
        self._random.choice(
            [self.kill_agent, self.kill_agent, self.kill_daemon, self.start_daemon, self.start_daemon]
        )()
        time.sleep(self._random.uniform(0, 0.6))

    def promised(self) -> dict[str, int]:
        """Return the runs whose recording had come to its end, and how many events each has."""
        promised = {}
        for journal in self._journals.iterdir():
            for line in journal.read_text().splitlines():
                event_id, _, events = line.partition(" ")
                promised[event_id] = int(events)
        return promised

    def finish(self) -> Verdict:
        """End the agents, send what they left, and look into the database."""
        for agent in self._agents:
            agent.kill()
            agent.wait()
        self._agents = []
        self.start_daemon()
        assert self._daemon is not None
        self._daemon.wait_for_line("Serving")
        telemetryd("sync", "--buffer-dir", self.buffer, "--url", self.url, timeout_s=600)
        assert self._daemon.stop() == 0
        self._read_log(self._daemon)
        left = [path.name for path in self.buffer.iterdir() if path.suffix not in (".synced",)]
        with contextlib.closing(sqlite3.connect(self._folder / "telemetry.sqlite")) as database:
            return self._judge(database, left)

    def _judge(self, database: sqlite3.Connection, left: list[str]) -> Verdict:
        rows = database.execute("SELECT event_id, item_name, status FROM agent_runs").fetchall()
        whole = {row[0] for row in rows if row[2] == "success"}
        twice = len(rows) - len({row[1] for row in rows})  # the agent's own name of each of its runs
        promised = self.promised()
        lost = promised.keys() - whole
        if database.execute("SELECT 1 FROM sqlite_master WHERE name = 'run_events'").fetchone():
            query = "SELECT r.event_id, count(*) FROM run_events e JOIN agent_runs r ON r.id = e.run GROUP BY 1"
            events = dict(database.execute(query).fetchall())
            lost |= {event_id for event_id, count in promised.items() if events.get(event_id, 0) < count}
            twice += sum(count - 1 for count in events.values() if count > 1)
        return Verdict(
            len(promised),
            len(rows),
            lost,
            twice,
            len(left),
            self.agent_kills,
            self.daemon_kills,
            tuple(damage(database)),
            self._server_errors,
        )

    def close(self) -> None:
        """Leave no process behind."""
        for agent in self._agents:
            agent.kill()
            agent.wait()
        if self._daemon is not None:
            self._daemon.close()


@click.command()
@click.option("--minutes", default=10.0, show_default=True, help="How long.")
@click.option("--agents", default=2, show_default=True, help="How many agents at a time.")
@click.option("--pause", default=0.1, show_default=True, help="Seconds that an agent rests after each 20 runs.")
@click.option("--seed", type=int, help="Of the moments of death.")
def main(minutes: float, agents: int, pause: float, seed: int | None) -> None:
    """Kill and restart agents and daemon at random; print what was sent, stored, lost and stored twice."""
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(Path(folder), agents, pause, seed)
        try:
            end = time.monotonic() + minutes * 60
            while time.monotonic() < end:
                soak.disturb()
            verdict = soak.finish()
        finally:
            soak.close()
    click.echo(str(verdict))
    sys.exit(1 if verdict.lost or verdict.twice or verdict.left or verdict.damage or verdict.server_errors else 0)


if __name__ == "__main__":
    main()
