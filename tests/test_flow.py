from __future__ import annotations

import asyncio
import re
import time
import timeit

import pytest

from telemetryd.flow import HEADER, Flow
from tests.conftest import Api, MakeApi, make_run
from tests.contract.wire import RUNS, send

TARGET_S = 0.1
FULL = 5000
ADVICE = re.compile(r"batch=(\d+), pause=(\d+)")


def read(text: str) -> tuple[int, int]:
    found = ADVICE.fullmatch(text)
    assert found, text
    return int(found[1]), int(found[2])


class Disk:
    """Clients that obey, a writer that takes all they send into one group, and a disk of a certain speed."""

    def __init__(self, group_s: float, row_s: float, clients: int, spread: float = 0.1) -> None:
        self.flow = Flow(TARGET_S, FULL)
        self.group_s, self.row_s, self.clients, self.spread = group_s, row_s, clients, spread
        self.batch, self.pause_s = FULL, 0.0

    def latency(self, groups: int) -> float:
        """Let so many groups pass; return the latency of the last one."""
        latency_s = 0.0
        for number in range(groups):
            # A pause as long as a commit halves what is on its way.
            thinned = latency_s / (latency_s + self.pause_s) if self.pause_s else 1.0
            rows = max(1, int(self.clients * self.batch * thinned * (1 + self.spread * (number % 2 * 2 - 1))))
            latency_s = self.group_s + self.row_s * rows
            self.flow.measure(rows, latency_s, latency_s)
            self.flow.advise(self.clients, rows, self.batch, 0.0)
            self.batch, pause_ms = read(self.flow.text(is_idle=False))
            self.pause_s = pause_ms / 1000
        return latency_s


@pytest.mark.parametrize("spread", [0.1, 0.0], ids=["sizes differ", "all of one size"])
@pytest.mark.parametrize("row_s", [10e-6, 50e-6, 200e-6])
@pytest.mark.parametrize("clients", [1, 4, 64])
def test_clients_that_obey_come_to_the_target(row_s: float, clients: int, spread: float) -> None:
    disk = Disk(0.005, row_s, clients, spread)
    assert disk.latency(1) > TARGET_S or row_s * FULL < TARGET_S
    assert disk.latency(60) < TARGET_S * 1.5
    rows = disk.clients * disk.batch
    if disk.pause_s == 0 and disk.batch < FULL:
        assert rows * row_s > TARGET_S / 2  # and they use what the disk can do


def test_a_disk_whose_syncs_alone_miss_the_target_gets_full_batches() -> None:
    disk = Disk(0.3, 10e-6, 4)
    advised = []
    for _ in range(80):
        disk.latency(1)
        advised.append((disk.batch, disk.pause_s))
    assert advised[16:].count((FULL, 0.0)) >= 0.85 * 64  # a small one now and then finds out whether that is still so
    assert all(pause_s == 0.0 for _, pause_s in advised)


def test_rows_that_become_dear_are_noticed_though_batches_are_all_of_one_size() -> None:
    disk = Disk(0.3, 10e-6, 4, spread=0.0)
    disk.latency(40)
    disk.group_s, disk.row_s = 0.005, 100e-6
    disk.latency(60)
    assert disk.latency(1) < TARGET_S * 1.5


def test_single_runs_do_not_make_batches_small_when_there_is_room() -> None:
    flow = Flow(TARGET_S, FULL)
    for _ in range(50):
        flow.measure(1, 0.004, 0.004)
        flow.advise(1, 1, 1, 0.0)
    batch, pause_ms = read(flow.text(is_idle=False))
    assert batch > FULL * 0.9
    assert pause_ms == 0


def test_a_queue_that_fills_asks_for_a_pause_and_an_idle_daemon_for_none() -> None:
    flow = Flow(TARGET_S, FULL)
    assert flow.text(is_idle=True) == "batch=5000, pause=0"
    flow.measure(100, 0.01, 0.02)
    flow.advise(50, 100, 2, 0.5)
    assert read(flow.text(is_idle=False))[1] == 0
    flow.advise(100, 200, 2, 1.0)
    assert read(flow.text(is_idle=False))[1] == 20  # as long as a commit: half of them are not on their way then
    assert read(flow.text(is_idle=True))[1] == 20  # it may only just have become idle
    time.sleep(1.05)
    assert flow.text(is_idle=True) == "batch=5000, pause=0"
    flow.advise(1, 0, 0, 0.0)  # an empty command
    assert read(flow.text(is_idle=False))[1] == 0


@pytest.mark.parametrize("clients", [30, 60, 100, 400])
def test_single_runs_come_to_leave_room_in_a_small_queue(clients: int) -> None:
    flow, places, pause_s, latency_s = Flow(TARGET_S, FULL), 50, 0.0, 0.02
    fullest = []
    for _ in range(40):
        on_their_way = clients * latency_s / (latency_s + pause_s)
        fullest.append(on_their_way / places)
        flow.measure(min(round(on_their_way), places), latency_s / 2, latency_s)
        flow.advise(places, places, 1, min(on_their_way / places, 2.0))
        pause_s = read(flow.text(is_idle=False))[1] / 1000
    assert max(fullest[10:]) <= 0.8


def test_advice_costs_an_answer_less_than_a_microsecond() -> None:
    flow = Flow(TARGET_S, FULL)
    flow.advise(1, 1, 1, 0.0)
    best = min(timeit.repeat(lambda: flow.text(is_idle=True), number=10_000, repeat=7)) / 10_000
    assert best < 1e-6


async def test_answers_to_writes_and_refusals_carry_it(make_api: MakeApi) -> None:
    api = await make_api(rate_limit_enabled=True, rate_limit_rpm=8, max_batch=300)
    run = make_run()
    path = f"{RUNS}/{run['event_id']}"
    answers = [
        await send(api, "POST", RUNS, json=run),
        await send(api, "POST", RUNS, json=run),
        await send(api, "POST", RUNS, json={}),
        await send(api, "POST", f"{RUNS}/batch", json=[make_run()]),
        await send(api, "PATCH", path, json={"status": "success"}),
        await send(api, "PATCH", f"{RUNS}/nobody", json={"status": "success"}),
        await send(api, "POST", f"{path}/events", json={"event_type": "x"}),
    ]
    assert [answer.status for answer in answers] == [201, 200, 422, 200, 200, 404, 201]
    reading = await send(api, "GET", path)
    assert HEADER.lower() not in reading.headers
    refused = await send(api, "GET", path)
    assert refused.status == 429
    for answer in [*answers, refused]:
        batch, pause = read(answer.headers[HEADER.lower()])
        assert (batch, pause) == (300, 0)


async def test_who_has_no_right_to_ask_does_not_see_how_busy_the_daemon_is(make_api: MakeApi) -> None:
    name = HEADER.lower()
    api = await make_api(
        api_auth_enabled=True, api_auth_token="a-good-token", rate_limit_enabled=True, rate_limit_rpm=4
    )
    good = {"Authorization": "Bearer a-good-token"}
    foreign = {**good, "Origin": "http://evil.example"}
    answers = [
        await send(api, "POST", RUNS, json=make_run(), headers=good),
        await send(api, "POST", RUNS, json=make_run()),
        await send(api, "PATCH", f"{RUNS}/x", json={}, headers={"X-API-Key": "wrong"}),
        await send(api, "POST", RUNS, json=make_run(), headers=foreign),
        await send(api, "POST", RUNS, json=make_run()),
        await send(api, "POST", RUNS, json=make_run()),
        await send(api, "POST", RUNS, json=make_run(), headers=good),
    ]
    assert [(answer.status, name in answer.headers) for answer in answers] == [
        (201, True),
        (401, False),
        (401, False),
        (403, False),
        (401, False),
        (429, False),
        (429, True),
    ]


async def test_the_document_tells_which_answers_carry_it(api: Api) -> None:
    responses = (await api.get("/openapi.json"))["paths"][RUNS]["post"]["responses"]
    assert {status for status, answer in responses.items() if HEADER not in answer.get("headers", {})} == {"401", "403"}


async def test_a_full_queue_asks_for_a_pause(make_api: MakeApi) -> None:
    api = await make_api(queue_max=2)

    async def post(api: Api) -> tuple[int, int]:
        answer = await send(api, "POST", RUNS, json=make_run())
        return answer.status, read(answer.headers[HEADER.lower()])[1]

    answers = await asyncio.gather(*(post(api) for _ in range(200)))
    refused = [pause for status, pause in answers if status == 503]
    assert refused, "the queue was never full"
    assert min(refused) > 0
