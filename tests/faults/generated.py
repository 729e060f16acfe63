"""Makes requests without end from a seed: valid ones, some with a strange value, broken ones, and anything at all."""

from __future__ import annotations

import gzip
import json
import random
import zlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote

from telemetryd.model.queries import LIST
from telemetryd.model.runs import COLUMNS, PATCHABLE, STORED

RUNS: Final = "/api/v1/runs"
_NAMES: Final = tuple(parameter.name for parameter in LIST)
_PAGES: Final = (RUNS, "/metrics", "/api/v1/metadata", "/health")
_MEDIA_TYPES: Final = ("application/json; charset=utf-8", "application/x-ndjson", "text/plain", "")
_CODINGS: Final = ("gzip", "deflate", "zstd", "br")


@dataclass(frozen=True, slots=True)
class Generated:
    """One request as it goes over the wire."""

    data: bytes
    statuses: Collection[int]
    """What may be answered."""
    is_framed: bool = True
    """Whether the daemon can tell where it ends; if not, it answers 400 or nothing, and closes."""


_ANY: Final = (200, 201, 302, 400, 403, 404, 405, 413, 415, 422)
_GOOD: Final = range(200, 300)
_BAD: Final = range(400, 500)

STRANGE: Final[tuple[Any, ...]] = (
    None, True, False, 0, -1, 1.5, 1e308, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63), 10**40, "", " ", "\0",
    "a\0b", "5", "null", "x" * 255, "x" * 256, "x" * 5000, "\u2028", "\u202e", "\ufeff", "\ud7ff", "😀", "é", "e\u0301",
    "'; DROP TABLE agent_runs; --", "%00", "../../etc/passwd", "a/b", "\r\nX: y", "\x1b[31m", "{}", "[]", [], {}, [[]],
    [None], {"": None}, {"a": {"b": [1, 2, {"c": None}]}}, {"__proto__": 1}, {"\0": 1}, "running", "RUNNING", "failed",
    "bogus", "2025-12-24T10:00:00Z", "2025-12-24T10:00:00+05:30", "2026-02-30T00:00:00Z", "2025-12-24", "yesterday",
    "0000-01-01T00:00:00Z", "9999-12-31T23:59:59-23:59", "2025-12-24t10:00:00z", "2025-12-24T10:00:00.123456789Z",
    1766570400, "manual", "abcdef1", "git@github.com:acme/site.git", "https://gitlab.com/a/b",
)  # fmt: skip


class Generator:
    """The requests of one seed, in the same order each time."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._seed = seed
        self._number = 0
        self._makers: tuple[Callable[[], Generated], ...] = (
            self._valid, self._valid, self._valid_batch, self._valid_query, self._valid_patch,
            self._strange_run, self._strange_run, self._strange_patch, self._strange_batch, self._strange_query,
            self._strange_path, self._strange_headers, self._mangled_body, self._mangled_body, self._coded_body,
            self._mangled_request, self._any_body, self._any_body, self._any_query, self._any_id,
        )  # fmt: skip

    def __next__(self) -> Generated:
        """Make the next request."""
        return self._random.choice(self._makers)()

    def _run(self) -> dict[str, Any]:
        self._number += 1
        chance = self._random
        run: dict[str, Any] = {
            "event_id": f"{self._seed}-{self._number}",
            "run_id": f"run-{self._number}",
            "start_time": f"2025-12-{chance.randrange(1, 29):02}T10:{chance.randrange(60):02}:00Z",
            "agent_name": f"agent-{chance.randrange(20)}",
            "job_type": f"job-{chance.randrange(5)}",
        }
        if chance.random() < 0.5:
            run |= {"status": "success", "items_failed": chance.randrange(10), "metrics_json": {"n": chance.random()}}
        return run

    def _some_id(self) -> str:
        return f"{self._seed}-{self._random.randrange(1, self._number + 2)}"

    def _request(
        self,
        method: str,
        target: str,
        body: bytes | None = None,
        statuses: Collection[int] = _ANY,
        headers: str = "Content-Type: application/json\r\n",
        *,
        is_framed: bool = True,
    ) -> Generated:
        head = f"{method} {target} HTTP/1.1\r\nHost: localhost\r\n"
        # Of these the daemon reads no further than the head, and closes.
        is_framed = is_framed and len(head) < 7_000 and headers.count("Content-Type") < 2
        if body is None:
            return Generated(f"{head}\r\n".encode("utf-8", "surrogateescape"), statuses, is_framed)
        if self._random.random() < 0.1:
            place = self._random.randrange(len(body) + 1)
            parts = (part for part in (body[:place], body[place:]) if part)
            chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
            return Generated(
                f"{head}{headers}Transfer-Encoding: chunked\r\n\r\n".encode("utf-8", "surrogateescape") + chunks,
                statuses,
                is_framed,
            )
        length = f"Content-Length: {len(body)}\r\n\r\n"
        return Generated(f"{head}{headers}{length}".encode("utf-8", "surrogateescape") + body, statuses, is_framed)

    def _valid(self) -> Generated:
        return self._request("POST", RUNS, json.dumps(self._run()).encode(), _GOOD)

    def _valid_batch(self) -> Generated:
        runs = [self._run() for _ in range(self._random.randrange(1, 6))]
        if self._random.random() < 0.5:
            body = b"\n".join(json.dumps(run).encode() for run in runs)
            return self._request("POST", f"{RUNS}/batch", body, _GOOD, "Content-Type: application/x-ndjson\r\n")
        return self._request("POST", f"{RUNS}/batch", json.dumps(runs).encode(), _GOOD)

    def _valid_query(self) -> Generated:
        targets = (
            f"{RUNS}?limit={self._random.randrange(1, 20)}&agent_name=agent-{self._random.randrange(25)}",
            f"{RUNS}?limit=5&status=success&created_after=2025-01-01T00:00:00Z",
            f"{RUNS}?limit=3&offset={self._random.randrange(50)}",
            "/health",
            "/metrics",
            "/api/v1/metadata",
        )
        return self._request("GET", self._random.choice(targets), None, _GOOD)

    def _valid_patch(self) -> Generated:
        body = {"status": "partial", "items_failed": self._random.randrange(99)}
        return self._request("PATCH", f"{RUNS}/{self._some_id()}", json.dumps(body).encode())  # 404 if it is no run

    def _strange_run(self) -> Generated:
        run = self._run()
        for _ in range(self._random.randrange(1, 4)):
            run[self._random.choice(STORED)] = self._random.choice(STRANGE)
        if self._random.random() < 0.2:
            del run[self._random.choice(list(run))]
        if self._random.random() < 0.2:
            run[str(self._random.choice(STRANGE))] = self._random.choice(STRANGE)
        return self._request("POST", RUNS, self._dump(run))

    def _strange_patch(self) -> Generated:
        body = {self._random.choice(PATCHABLE): self._random.choice(STRANGE)}
        suffix = self._random.choice(("", "", "/associate-commit", "/commit-url"))
        if suffix == "/associate-commit":
            keys = ("commit_hash", "commit_source", "commit_author", "commit_timestamp")
            body = {key: self._random.choice(STRANGE) for key in keys}
        method = "POST" if suffix == "/associate-commit" else "PATCH"
        return self._request(method, f"{RUNS}/{self._some_id()}{suffix}", self._dump(body))

    def _strange_batch(self) -> Generated:
        items = [self._random.choice((self._run(), self._random.choice(STRANGE))) for _ in range(4)]
        wrapped: Any = self._random.choice((items, {"runs": items}, {"runs": self._random.choice(STRANGE)}, [items]))
        return self._request("POST", f"{RUNS}/batch", self._dump(wrapped))

    def _dump(self, value: object) -> bytes:
        text = json.dumps(value, ensure_ascii=self._random.random() < 0.5)
        return text.encode("utf-8", "surrogatepass")

    def _strange_query(self) -> Generated:
        names = [self._random.choice((*_NAMES, "format", "x", "")) for _ in range(self._random.randrange(1, 4))]
        values = [self._random.choice((*STRANGE, "%", "%zz", "%ff", "9" * 30, "1e3", "９", "AAAA")) for _ in names]
        pairs = (
            f"{name}={value if self._raw(value) else quote(str(value))}"
            for name, value in zip(names, values, strict=True)
        )
        return self._request("GET", f"{RUNS}?{'&'.join(pairs)}")

    def _raw(self, value: object) -> bool:
        return isinstance(value, str) and value.isascii() and value.isprintable() and " " not in value

    def _strange_path(self) -> Generated:
        part = quote(str(self._random.choice(STRANGE)), safe="")
        paths = (f"{RUNS}/{part}", f"{RUNS}/{part}/commit-url", f"/{part}", f"{RUNS}//{part}", f"/docs/static/{part}")
        methods = ("GET", "GET", "PATCH", "POST", "DELETE", "PUT", "OPTIONS", "TRACE")
        return self._request(
            self._random.choice(methods), self._random.choice(paths), self._random.choice((None, b"{}"))
        )

    def _strange_headers(self) -> Generated:
        lines = (
            "Content-Type: text/plain", "Content-Type: application/json; charset=utf-16", "Content-Encoding: br",
            "Content-Encoding: gzip, gzip", "Content-Type: ", "Accept: text/html", "Expect: 100-continue",
            "Authorization: Bearer x", "X-Request-ID: \u00e9", "X-Request-ID: " + "r" * 300, "Cookie: a=b; c",
            "X-Forwarded-For: 10.0.0.1", "Range: bytes=0-1", "If-None-Match: *", "Accept-Encoding: gzip;q=0",
            "Content-Length: 2", "Origin: http://localhost", "Upgrade: h2c", "Prefer: respond-async", "DNT: 1",
        )  # fmt: skip
        chosen = [line for line in self._random.sample(lines, 3) if line not in ("Content-Length: 2", "Upgrade: h2c")]
        # 100-continue is answered twice, which the client of these tests does not follow.
        headers = "".join(f"{line}\r\n" for line in chosen if not line.startswith("Expect"))
        return self._request("POST", RUNS, json.dumps(self._run()).encode(), _ANY, headers)

    def _mangled_body(self) -> Generated:
        body = bytearray(self._random.choice((self._dump(self._run()), self._dump([self._run(), self._run()]))))
        for _ in range(self._random.randrange(1, 5)):
            place = self._random.randrange(len(body))
            how = self._random.randrange(4)
            if how == 0:
                body[place] = self._random.randrange(256)
            elif how == 1:
                del body[place : place + self._random.randrange(1, 20)]
            elif how == 2:
                body[place:place] = self._random.choice((b'"', b"{", b"[", b"}", b",", b"\\u0000", b"\\ud800", b"\xff"))
            else:
                body[place:place] = body[: self._random.randrange(20)]
            body = body or bytearray(b" ")
        return self._request("POST", self._random.choice((RUNS, f"{RUNS}/batch")), bytes(body))

    def _coded_body(self) -> Generated:
        plain = json.dumps(self._run()).encode()
        coding, body = self._random.choice(
            (("gzip", gzip.compress(plain)), ("deflate", zlib.compress(plain)), ("zstd", plain), ("gzip", plain))
        )
        if self._random.random() < 0.5:
            body = body[: self._random.randrange(len(body))] + self._random.randbytes(self._random.randrange(9))
        headers = f"Content-Type: application/json\r\nContent-Encoding: {coding}\r\n"
        return self._request("POST", RUNS, body, _ANY, headers)

    def _mangled_request(self) -> Generated:
        data = bytearray(self._valid().data)
        end = data.index(b"\r\n\r\n")
        for _ in range(self._random.randrange(1, 4)):
            place = self._random.randrange(end)
            data[place : place + self._random.randrange(3)] = self._random.randbytes(self._random.randrange(3))
        return Generated(bytes(data), _ANY, is_framed=False)

    # --- Anything at all -------------------------------------------------------------------------

    def _any_body(self) -> Generated:
        """Anything as the body of a request that writes, under any media type and coding."""
        method, target = self._random.choice(
            (
                ("POST", RUNS),
                ("POST", f"{RUNS}/batch"),
                ("POST", f"{RUNS}/{self._some_id()}/associate-commit"),
                ("PATCH", f"{RUNS}/{self._some_id()}"),
            )
        )
        makers = (self._bytes, lambda: self._dump(self._value()), self._any_lines, self._nested)
        body = self._random.choice(makers)()
        if self._random.random() < 0.6:
            return self._request(method, target, body)
        kind, coding = self._random.choice(_MEDIA_TYPES), self._random.choice(("", *_CODINGS))
        headers = f"Content-Type: {kind}\r\n" * bool(kind) + f"Content-Encoding: {coding}\r\n" * bool(coding)
        return self._request(method, target, body, headers=headers)

    def _any_lines(self) -> bytes:
        return b"\n".join(self._dump(self._value()) for _ in range(self._random.randrange(4)))

    def _nested(self) -> bytes:
        """Objects or arrays in each other, closed or not."""
        depth = self._random.randrange(1, 5000)
        return self._random.choice((b'{"metrics_json":' * depth, b"[" * depth + b"]" * depth))

    def _bytes(self) -> bytes:
        return self._random.randbytes(self._random.randrange(60))

    def _value(self, depth: int = 3) -> Any:
        """Any value of JSON; names of fields are among the keys."""
        chance = self._random.random() if depth else 0
        if chance < 0.2:
            return self._random.choice((*STRANGE, self._text(), self._random.uniform(-1e9, 1e9)))
        values = [self._value(depth - 1) for _ in range(self._random.randrange(5))]
        if chance < 0.5:
            return values
        return {self._random.choice((*COLUMNS, self._text())): value for value in values}

    def _text(self) -> str:
        return "".join(chr(self._random.randrange(0x110000)) for _ in range(self._random.randrange(6)))

    def _any_query(self) -> Generated:
        words = (*_NAMES, "format", "=", "&", "%", "%00", "+", "5")
        words_only = "".join(self._random.choice(words) for _ in range(self._random.randrange(10)))
        target = self._random.choice(_PAGES)
        if self._random.random() < 0.5:
            return self._request("GET", f"{target}?{words_only}")
        query, is_framed = self._any_text()
        return self._request("GET", f"{target}?{query}", is_framed=is_framed)

    def _any_id(self) -> Generated:
        event_id, is_framed = self._any_text()
        target = f"{RUNS}/{event_id}{self._random.choice(('', '/commit-url'))}"
        if self._random.random() < 0.5:
            return self._request("PATCH", target, b'{"status":"success"}', is_framed=is_framed)
        return self._request("GET", target, is_framed=is_framed)

    def _any_text(self) -> tuple[str, bool]:
        """Return any bytes as a part of a target; also whether they are quoted, without which it may be no request."""
        raw = self._bytes()
        if self._random.random() < 0.7:
            return quote(raw, safe="=&" if self._random.random() < 0.5 else ""), True
        return bytes(byte for byte in raw if byte > 0x20 and byte != 0x7F).decode("utf-8", "surrogateescape"), False
