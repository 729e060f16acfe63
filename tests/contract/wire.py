"""What goes over the wire and comes back: answers in full, raw requests, and the one shape of every error."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tests.conftest import Api

RUNS = "/api/v1/runs"
BATCH = "/api/v1/runs/batch"
JSON = {"Content-Type": "application/json"}
NDJSON = {"Content-Type": "application/x-ndjson"}
STATUSES = ["running", "success", "failure", "partial", "timeout", "cancelled"]
SENTENCE_OF_STATUS = f"Status must be one of: {STATUSES}"


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer; header names in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def text(self) -> str:
        return self.body.decode()


async def send(api: Api, method: str, path: str, **options: Any) -> Answer:
    """Send a request through aiohttp's client."""
    async with api.client.request(method, path, **options) as response:
        headers = {name.lower(): value for name, value in response.headers.items()}
        return Answer(response.status, headers, await response.read())


async def post(api: Api, body: bytes, path: str = RUNS, headers: Mapping[str, str] = JSON) -> Answer:
    """Send a body byte for byte."""
    return await send(api, "POST", path, data=io.BytesIO(body), headers={"Content-Length": str(len(body)), **headers})


async def send_raw(
    api: Api, request: bytes, *, half_close: bool = False, only_first: bool = False, is_head: bool = False
) -> list[Answer]:
    """Send bytes to the socket and return the answers until the daemon closes the connection.

    With `only_first`, until there is one answer: after a body that it refuses, the daemon waits for the rest of it.
    """
    assert api.client.port is not None
    reader, writer = await asyncio.open_connection("127.0.0.1", api.client.port)
    try:
        with contextlib.suppress(ConnectionError):  # it may refuse before it has read everything
            writer.write(request)
            if half_close:
                writer.write_eof()
            await writer.drain()
        received = b""
        async with asyncio.timeout(60):
            with contextlib.suppress(ConnectionError):
                while part := await reader.read(1 << 16):
                    received += part
                    if only_first and b"\r\n\r\n" in received and received.endswith(b"}"):
                        break
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
    return _split(received, is_head=is_head)


def _split(received: bytes, *, is_head: bool) -> list[Answer]:
    answers = []
    while received:
        head, _, received = received.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        length = 0 if is_head else int(headers.get("content-length", "0"))
        answers.append(Answer(int(first.split()[1]), headers, received[:length]))
        received = received[length:]
    return answers


def check_error(answer: Answer, status: int) -> Any:
    """Check that an answer has the shape of every error and gives nothing away; return its detail."""
    assert answer.status == status, answer.text[:1000]
    assert answer.headers["content-type"] == "application/json"
    assert set(answer.json) == {"detail"}
    detail = answer.json["detail"]
    if status == 422:
        assert isinstance(detail, list)
        assert detail
        for item in detail:
            assert set(item) == {"loc", "msg", "type"}
            assert item["loc"][0] == "body"
            assert item["msg"]
            assert item["type"]
    else:
        assert isinstance(detail, str)
        assert detail
        assert "\n" not in detail or status == 404  # which repeats the event_id as it is
    # The long inputs of these tests repeat one character, so an echo of more than 200 is a run of it.
    assert re.search(r"(.)\1{200}", json.dumps(detail, ensure_ascii=False)) is None
    for leak in ("Traceback", "<html", "sqlite3.", ".py", "aiohttp", "pydantic"):
        assert leak not in answer.text
    return detail


def is_in_hand(api: Api) -> bool:
    """Tell whether the writer has taken the only command off the queue, and has not done it yet."""
    health = api.store.health()
    return health.oldest_s > 0 and health.queue_depth == 0


async def check_alive(api: Api) -> None:
    """Check that the daemon still answers and takes writes."""
    health = await send(api, "GET", "/health")
    assert (health.status, health.json["status"]) == (200, "ok")


def places(detail: Any) -> list[tuple[str | int, ...]]:
    """Return where the faults of a 422 are."""
    return [tuple(item["loc"]) for item in detail]
