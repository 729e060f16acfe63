"""What waits together goes out together, and ends in the same run as if each line had been sent by itself."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson
from hypothesis import given, settings
from hypothesis import strategies as st

from telemetryd.client import Config
from telemetryd.client.aside import Aside
from telemetryd.client.batch import Batch
from telemetryd.client.counters import Counters
from telemetryd.client.delivery import Delivery
from telemetryd.client.fields import CHANGES
from telemetryd.client.lines import Json, encode
from telemetryd.client.run import Run
from telemetryd.client.transport import Transport, run_path
from tests.client.conftest import url_of
from tests.conftest import Api

ID = "the-run"
OF_THE_SERVER = ("id", "event_id", "updated_at")


class Lines:
    """Keeps what a run records."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []

    def write(self, line: Mapping[str, Any]) -> bool:
        self.lines.append(encode(line).rstrip())
        return True

    def surroundings(self) -> Mapping[str, str]:
        return {"host": "h"}

    def begun(self, run: Run) -> None:
        pass

    def ended(self, run: Run) -> None:
        pass

    def after(self) -> None:
        return None

    def rejected(self, field: str, why: str) -> None:
        pass

    def failed(self) -> None:
        raise AssertionError


def values(name: str) -> st.SearchStrategy[object]:
    if name == "status":
        return st.sampled_from(["running", "success", "failed", "nonsense"])
    if name.endswith("_json"):
        return st.dictionaries(st.sampled_from("ab"), st.integers(0, 3) | st.none(), max_size=2)
    if name == "labels":
        return st.dictionaries(st.sampled_from(["a", "b", "Bad"]), st.sampled_from(["x", "y", "", None]), max_size=3)
    if name.startswith(("items_", "duration")):
        return st.integers(-1, 9)
    if name in ("end_time", "git_commit_timestamp", "expected_by"):
        return st.sampled_from(["2025-12-24T10:00:00Z", "yesterday"])
    return st.sampled_from(["manual", "text", ""])


CHANGED = st.fixed_dictionaries({}, optional={name: st.none() | values(name) for name in sorted(CHANGES)})
NEVER_CHANGED = st.sampled_from(
    [{"event_id": "evil"}, {"created_at": "2020-01-01T00:00:00Z"}, {"agent_name": "evil"}, {"unheard_of": 1}, {}]
)
CALLS = st.one_of(
    st.tuples(st.just("update"), CHANGED),
    st.tuples(st.just("finish"), CHANGED),
    st.tuples(st.just("metrics"), st.dictionaries(st.sampled_from("ab"), st.integers(0, 3), max_size=2)),
    st.tuples(st.just("context"), st.dictionaries(st.sampled_from("ab"), st.text(max_size=2), max_size=2)),
    st.tuples(st.just("labels"), st.dictionaries(st.sampled_from("ab"), st.sampled_from(["x", None]), max_size=2)),
    st.tuples(st.just("items"), st.just({"succeeded": 3})),
    st.tuples(st.just("event"), st.just({})),
    st.tuples(st.just("by hand"), st.builds(lambda more, fields: {**fields, **more}, NEVER_CHANGED, CHANGED)),
)


def written(calls: list[tuple[str, Json]]) -> list[bytes]:
    """Return the lines of a run about which all this is said."""
    recorder = Lines()
    run = Run(recorder, "a", "j", None, {"event_id": ID, "run_id": "r", "created_at": "2025-12-24T10:00:00Z"}).start()
    for name, fields in calls:
        if name == "by hand":
            recorder.write({"op": "update", "event_id": ID, "fields": fields})
        elif name == "event":
            run.event("step")
        else:
            getattr(run, name)(**fields)
    return recorder.lines


async def test_lines_sent_together_or_one_by_one_end_in_the_same_run(api: Api) -> None:
    transport = Transport(Config(url=url_of(api)))
    delivery = Delivery(transport, lambda *_: None, Counters())
    count = 0

    def ending(lines: list[bytes], cuts: set[int]) -> Json:
        """Send lines under an event_id of their own, cut into batches; return the run, with how many events it has."""
        nonlocal count
        count += 1
        event_id = f"run-{count}"
        renamed = [line.replace(ID.encode(), event_id.encode()) for line in lines]
        begin = 0
        for end in sorted({*cuts, len(lines)}):
            if begin < end:
                delivery.send(Batch.of(renamed[begin:end]))
            begin = end
        run: Json = transport.request("GET", run_path(event_id) + "?include=events").body
        told = {name: value for name, value in run.items() if name not in OF_THE_SERVER}
        return {**told, "events": len(run["events"])}

    def check() -> None:
        @settings(max_examples=40, deadline=None)
        @given(st.lists(CALLS, max_size=6), st.sets(st.integers(1, 6), max_size=3))
        def same(calls: list[tuple[str, Json]], cuts: set[int]) -> None:
            lines = written(calls)
            apart = ending(lines, set(range(len(lines))))
            assert ending(lines, set()) == apart
            assert ending(lines, cuts) == apart

        same()

    await asyncio.to_thread(check)
    transport.close()
    assert not await api.list(agent_name="evil")


async def test_a_repeat_with_what_was_said_later_is_no_other_body(api: Api, tmp_path: Path) -> None:
    recorder = Lines()
    run = Run(recorder, "a", "j", None, {"event_id": ID, "labels": {"a": "1"}, "context_json": {"x": 1}}).start()
    run.context(y=2)
    run.labels(a=None, b="2")
    run.finish("failure")
    start, *later = recorder.lines
    transport = Transport(Config(url=url_of(api)))
    spool, files = (Delivery(transport, lambda *_: None, Counters(), aside) for aside in (Aside(tmp_path), None))

    def deliver() -> None:
        for delivery, lines in (
            (spool, [start]),  # the answer was lost, and so were those of
            (spool, [start, *later[:1]]),
            (files, [start, *later]),
            (spool, [start]),  # a window that was smaller for once
        ):
            delivery.send(Batch.of(lines))

    await asyncio.to_thread(deliver)
    stored = await api.get(f"/api/v1/runs/{ID}")
    assert (stored["status"], stored["labels"], stored["context_json"]) == ("failure", {"b": "2"}, {"x": 1, "y": 2})
    async with api.client.get("/metrics?format=prometheus") as response:
        assert "telemetryd_runs_differing_total 0.0" in await response.text()
    other = orjson.dumps({**orjson.loads(start), "status": "partial", "product": "another"})
    await asyncio.to_thread(files.send, Batch.of([other]))
    async with api.client.get("/metrics?format=prometheus") as response:
        assert "telemetryd_runs_differing_total 1.0" in await response.text()
    transport.close()


async def test_what_is_null_leaves_the_value_as_it_is(api: Api) -> None:
    recorder = Lines()
    run = Run(recorder, "a", "j", None, {"event_id": ID}).start()
    run.update(error_details="what went wrong")
    said = {"status": "failure", "error_details": None}  # our client leaves nulls out, other programs write them
    recorder.write({"op": "update", "event_id": ID, "fields": said})
    transport = Transport(Config(url=url_of(api)))
    await asyncio.to_thread(Delivery(transport, lambda *_: None, Counters()).send, Batch.of(recorder.lines))
    transport.close()
    stored = await api.get(f"/api/v1/runs/{ID}")
    assert (stored["status"], stored["error_details"]) == ("failure", "what went wrong")


def test_one_name_twice_in_a_line_joins_no_other_run() -> None:
    twice = b'{"event_id":"first","run_id":"r","agent_name":"a","job_type":"j","event_id":"second"}'
    change = encode({"op": "update", "event_id": "first", "fields": {"status": "success"}}).rstrip()
    batch = Batch.of([twice, change])
    assert [type(step).__name__ for step in batch.steps] == ["Runs", "Update"]
    assert orjson.loads(batch.steps[0].items[0].body)["event_id"] == "second"  # type: ignore[union-attr]
