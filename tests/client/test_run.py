"""What an agent writes, and what the daemon has afterwards."""

from __future__ import annotations

import asyncio
import concurrent.futures
import re
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from telemetryd.client import Client, Config, Run
from telemetryd.client.context import PARENT_VARIABLE
from tests.client.conftest import MakeClient, flushed, url_of
from tests.conftest import Api, MakeApi, eventually, make_run


async def stored(api: Api, run: Run | str) -> dict[str, Any]:
    event_id = run if isinstance(run, str) else run.event_id
    found: dict[str, Any] = await api.get(f"/api/v1/runs/{event_id}", params={"include": "events"})
    return found


async def test_a_run_with_everything(api: Api, make_client: MakeClient) -> None:
    client = make_client(url_of(api), fields={"environment": "test"})
    with client.run("hugo-translator", "translate_directory", product="words", items_discovered=100) as run:
        await flushed(client)
        begun = await stored(api, run)
        run.items(succeeded=45, failed=1, skipped=2)
        run.metrics(tokens=5)
        run.metrics(cost=0.5)
        run.context(shard=3)
        run.update(output_summary="half of it")
        run.event("checkpoint", {"file": "a.md"}, line=7)
        run.event("plain")
    await flushed(client)
    ended = await stored(api, run)
    assert (begun["status"], begun["items_discovered"], begun["product"]) == ("running", 100, "words")
    assert re.fullmatch(r"\d{8}T\d{6}Z-hugo-translator-[0-9a-f]{8}", begun["run_id"])
    assert begun["host"]
    assert begun["environment"] == "test"
    expected = {
        "status": "success",
        "items_succeeded": 45,
        "items_failed": 1,
        "items_skipped": 2,
        "metrics_json": {"tokens": 5, "cost": 0.5},
        "context_json": {"shard": 3},
        "output_summary": "half of it",
    }
    assert {name: ended[name] for name in expected} == expected
    assert ended["end_time"] > ended["start_time"]
    assert ended["duration_ms"] >= 0
    events = [(event["event_type"], event["payload"]) for event in ended["events"]]
    assert events == [("checkpoint", {"file": "a.md", "line": 7}), ("plain", None)]


async def test_this_checkout_is_recorded(api: Api, make_client: MakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent)
    client = make_client(url_of(api))
    with client.run("a", "j") as run:
        pass
    await flushed(client)
    ended = await stored(api, run)
    if (Path(__file__).parents[2] / ".git").exists():
        assert re.fullmatch("[0-9a-f]{40}", ended["git_commit_hash"])


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("no such file"), "failure"),
        (KeyboardInterrupt(), "cancelled"),
        (asyncio.CancelledError(), "cancelled"),
        (concurrent.futures.CancelledError(), "cancelled"),
        (TimeoutError("too slow"), "timeout"),
        (SystemExit(3), "failure"),
        (SystemExit(0), "success"),
        (SystemExit(), "success"),
        (GeneratorExit(), "cancelled"),  # a coroutine that was closed
    ],
)
async def test_a_run_ends_as_the_exception_says_which_passes_on(
    api: Api, make_client: MakeClient, error: BaseException, status: str
) -> None:
    client = make_client(url_of(api))
    run = client.run("a", "j")
    with pytest.raises(type(error)) as caught, run:
        raise error
    assert caught.value is error
    await flushed(client)
    ended = await stored(api, run)
    assert ended["status"] == status
    if status == "success":
        assert ended["error_summary"] is None
    else:
        text = str(error)
        assert ended["error_summary"] == (f"{type(error).__name__}: {text}" if text else type(error).__name__)
        assert ended["error_details"].startswith("Traceback")
        assert "raise error" in ended["error_details"]


async def test_an_exception_that_cannot_be_shown_is_reported_all_the_same(api: Api, make_client: MakeClient) -> None:
    class UnspeakableError(Exception):
        def __str__(self) -> str:
            raise RuntimeError("never")

    client = make_client(url_of(api))
    run = client.run("a", "j")
    with pytest.raises(UnspeakableError), run:
        raise UnspeakableError
    await flushed(client)
    assert (await stored(api, run))["error_summary"].startswith("UnspeakableError")


async def test_async_with_and_a_cancelled_task(api: Api, make_client: MakeClient) -> None:
    client = make_client(url_of(api))
    runs = []

    async def work() -> None:
        async with client.run("a", "j") as run:
            runs.append(run)
            await asyncio.sleep(30)

    task = asyncio.create_task(work())
    await eventually(lambda: bool(runs))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await flushed(client)
    assert (await stored(api, runs[0]))["status"] == "cancelled"


async def test_each_call_of_a_decorated_function_is_a_run(api: Api, make_client: MakeClient) -> None:
    client = make_client(url_of(api))

    @client.run("a", "plain", product="words", event_id="not-again")
    def plain(number: int) -> int:
        """Say so."""
        return number * 2

    @client.run("a", "awaited")
    async def awaited(number: int) -> int:
        await asyncio.sleep(0)
        return 10 // number

    assert [plain(1), plain(2), await awaited(5)] == [2, 4, 2]
    assert (plain.__name__, plain.__doc__) == ("plain", "Say so.")
    with pytest.raises(ZeroDivisionError):
        await awaited(0)
    await flushed(client)
    found = [(run["job_type"], run["status"], run["product"]) for run in await api.list(agent_name="a")]
    assert sorted(found, key=str) == [
        ("awaited", "failure", None),
        ("awaited", "success", None),
        ("plain", "success", "words"),
        ("plain", "success", "words"),
    ]


async def test_start_and_finish_and_what_comes_after(api: Api, make_client: MakeClient) -> None:
    client = make_client(url_of(api))
    run = client.run("a", "j", run_id="my-own", event_id="my-event").start()
    run.start()
    run.finish("partial", items_failed=3, error_summary="some", metrics_json={"x": 1})
    run.finish("failure")
    await flushed(client)
    ended = await stored(api, "my-event")
    assert (ended["run_id"], ended["status"], ended["items_failed"]) == ("my-own", "partial", 3)
    never_begun = client.run("a", "j")
    never_begun.finish()
    await flushed(client)
    assert (await stored(api, never_begun))["status"] == "success"


async def test_runs_inside_runs_know_their_parent(
    api: Api, make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(PARENT_VARIABLE, raising=False)
    client = make_client(url_of(api))
    with client.run("a", "outer") as outer:
        with client.run("a", "inner") as inner:
            event_id = client.record({"agent_name": "a", "job_type": "recorded"})
        with client.run("a", "second") as second:
            pass
        environment = outer.environment()
    with client.run("a", "later") as later:
        pass
    assert event_id is not None
    await flushed(client)
    parents = [(await stored(api, run))["parent_run_id"] for run in (outer, inner, event_id, second, later)]
    assert parents == [None, outer.run_id, inner.run_id, outer.run_id, None]
    assert environment[PARENT_VARIABLE] == outer.run_id


async def test_tasks_do_not_mix_up_their_runs(api: Api, make_client: MakeClient) -> None:
    client = make_client(url_of(api))

    async def work(number: int) -> tuple[Run, Run]:
        async with client.run("a", f"outer-{number}") as outer:
            await asyncio.sleep(0.01)
            async with client.run("a", "inner") as inner:
                await asyncio.sleep(0.01)
        return outer, inner

    pairs = await asyncio.gather(*(work(number) for number in range(5)))
    await flushed(client)
    for outer, inner in pairs:
        assert (await stored(api, inner))["parent_run_id"] == outer.run_id


async def test_threads_may_share_a_run(api: Api, make_client: MakeClient) -> None:
    client = make_client(url_of(api))
    with client.run("a", "j") as run:
        threads = [threading.Thread(target=run.metrics, kwargs={f"m{number}": number}) for number in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    await flushed(client)
    assert (await stored(api, run))["metrics_json"] == {f"m{number}": number for number in range(20)}


async def test_what_has_no_field_is_kept_all_the_same(api: Api, make_client: MakeClient) -> None:
    client = make_client(url_of(api))
    with client.run("a", "j", agent_owner="me", retries=3) as run:  # type: ignore[call-arg]
        await flushed(client)
        run.items(discovered=7)
        run.update(product="late")
    await flushed(client)
    ended = await stored(api, run)
    assert ended["context_json"] == {"agent_owner": "me", "product": "late"}
    assert ended["metrics_json"] == {"retries": 3, "items_discovered": 7}
    assert client.stats()["dead"] == 0


async def test_nothing_raises_into_the_agent(make_client: MakeClient, buffer: Path) -> None:
    client = make_client()
    run: Any = client.run(5, None)  # type: ignore[arg-type]
    run.items(succeeded="many")
    run.metrics(x=object(), y={1, 2}, z=float("nan"), s="\ud800\0", deep=[[[{}]]])
    run.event(None, "no object")
    run.update(status=object())
    run.finish(object())
    everything: list[Any] = [{}, None, 5, "text", {"agent_name": object()}, {1: 2}, [("agent_name", "a")]]
    for value in everything:
        client.record(value)
    assert buffer.exists()  # noqa: ASYNC240


@pytest.mark.parametrize(
    "wrong",
    [
        *({"url": url} for url in ("ftp://x", "localhost:8765", "http://", "http://:8765", "http://h:port", "unix://")),
        *({"url": url} for url in ("http://h:70000", "http://me:secret@h", "http://[::1", "http://h/?x=1")),
        *({"token": token} for token in ("two\nlines", "a\0b")),
        {"durability": "maybe"},
        {"timeout_s": 0},
        {"keep_s": -1},
    ],
)
def test_a_setting_that_cannot_be_used_is_an_error_at_once(wrong: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))} ") as caught:
        Client(**{"buffer_dir": tmp_path, **wrong})
    assert "secret" not in str(caught.value)
    with pytest.raises(TypeError, match="unknown settings: colour"):
        Client(buffer_dir=tmp_path, colour="red")


@pytest.mark.parametrize(
    ("variable", "text", "rule"),
    [
        ("TELEMETRY_API_URL", "ftp://x", "must be http://…, https://… or unix:///path (it is 'ftp://x')"),
        ("TELEMETRY_TIMEOUT_S", "0", "must be positive (it is '0')"),
        ("TELEMETRY_TIMEOUT_S", "soon", "must be a number (it is 'soon')"),
        ("TELEMETRY_BUFFER_MAX_MB", "much", "must be a number (it is 'much')"),
        ("TELEMETRY_BUFFER_DURABILITY", "maybe", "must be write or fsync (it is 'maybe')"),
        ("TELEMETRY_SEND", "perhaps", "must be true or false (it is 'perhaps')"),
        ("TELEMETRY_API_AUTH_TOKEN", "a\tb", "must be printable text of one line"),
    ],
)
def test_a_variable_that_cannot_be_used_is_named(
    monkeypatch: pytest.MonkeyPatch, variable: str, text: str, rule: str
) -> None:
    monkeypatch.setenv(variable, text)
    with pytest.raises(ValueError, match=re.escape(f"{variable}: {rule}") + "$"):
        Config.load()


async def test_a_token_may_hold_any_letter(make_api: MakeApi, make_client: MakeClient) -> None:
    token = "Schlüssel-Æ-鍵-…"
    api = await make_api(api_auth_enabled=True, api_auth_token=token)
    client = make_client(url_of(api), token=token)
    client.record(make_run())
    assert await asyncio.to_thread(client.flush, 60), client.stats()


async def test_a_signal_handler_may_record_while_the_agent_does(
    api: Api, make_client: MakeClient, buffer: Path
) -> None:
    if sys.platform == "win32":
        pytest.skip("signals")
    import signal

    client = make_client(url_of(api), send=False)
    ticks: list[None] = []

    def tick(*_: object) -> None:
        ticks.append(None)  # in one step, as the next signal may come within this one
        client.record({"agent_name": "handler", "job_type": "j"})

    previous = signal.signal(signal.SIGALRM, tick)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        for _ in range(3000):
            client.record({"agent_name": "agent", "job_type": "j"})
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    lines = b"".join(path.read_bytes() for path in buffer.glob("*.jsonl.*")).splitlines()  # noqa: ASYNC240
    assert len(ticks) > 3
    assert len(lines) == 3000 + len(ticks)
    assert sum(b'"handler"' in line for line in lines) == len(ticks)


async def test_a_heartbeat_keeps_a_run_fresh_and_does_not_bring_it_back(api: Api, make_client: MakeClient) -> None:
    client = make_client(url_of(api))
    with client.run("a", "j", heartbeat=0.05) as run:
        await flushed(client)
        first = second = await stored(api, run)

        async def beats() -> bool:
            nonlocal second
            second = await stored(api, run)
            return bool(first["updated_at"] < second["updated_at"])

        await eventually(beats)
        await api.call("PATCH", f"/api/v1/runs/{run.event_id}", json={"status": "cancelled"})
        await asyncio.sleep(0.3)
        assert (await stored(api, run))["status"] == "cancelled"
    assert second["duration_ms"] > 0
    await flushed(client)
    await asyncio.sleep(0.1)
    last = await stored(api, run)
    await asyncio.sleep(0.2)
    assert await stored(api, run) == last, "no heartbeat after the end"


class Unspeakable:
    """Whatever is asked of it fails."""

    def __str__(self) -> str:
        raise RuntimeError("never")

    __repr__ = __str__


async def test_nothing_that_is_said_of_a_run_raises(api: Api, make_client: MakeClient) -> None:
    class Broken(dict[str, Any]):
        def keys(self) -> Any:
            raise RuntimeError("never")

    client = make_client(url_of(api))
    with client.run("a", "j", metrics_json=Broken(a=1)) as run:
        run.event(Unspeakable())  # type: ignore[arg-type]
        run.event("x", Broken(a=1))
        run.event("deep", "[" * 100_000)  # type: ignore[arg-type]
        run.metrics(x=Unspeakable())
        run.update(metrics_json="[" * 100_000)  # type: ignore[arg-type]
        run.update(context_json=Broken(a=1))
        run.items(succeeded=Unspeakable())  # type: ignore[arg-type]
    run = client.run("a", "j")
    with run:
        run.items(succeeded=2)
    await flushed(client)
    assert (await stored(api, run))["items_succeeded"] == 2
    assert client.stats()["rejected"] == 2


def test_many_threads_that_end_a_run_end_it_once(make_client: MakeClient, buffer: Path) -> None:
    client = make_client(send=False)
    for _ in range(30):
        run = client.run("a", "j")
        together = threading.Barrier(8)

        def end(run: Run = run, together: threading.Barrier = together) -> None:
            together.wait()
            run.finish()

        threads = [threading.Thread(target=end) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    client.close()
    (file,) = buffer.glob("*.ready")
    lines = file.read_bytes().splitlines()
    assert len([line for line in lines if line.startswith(b'{"op":"update"')]) == 30
    assert len(lines) == 60
