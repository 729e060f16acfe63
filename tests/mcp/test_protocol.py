"""Messages on the wire: versions, headers, methods, and what is no message, against the running app."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mcp_types import methods as sdk

from telemetryd.errors import InvalidRequestError, QueryTimeoutError
from telemetryd.mcp import bounds, endpoint, protocol, tools
from telemetryd.mcp.arguments import query_string
from telemetryd.mcp.tools import TOOLS
from telemetryd.web.answers import json_response
from tests.conftest import Api, MakeApi, make_run

META = {
    "io.modelcontextprotocol/protocolVersion": "2026-07-28",
    "io.modelcontextprotocol/clientInfo": {"name": "test", "version": "1"},
    "io.modelcontextprotocol/clientCapabilities": {},
}
JSON = {"Content-Type": "application/json"}
Object = dict[str, Any]


def modern(method: str, number: object = 1, **params: Any) -> Object:
    return {"jsonrpc": "2.0", "id": number, "method": method, "params": {**params, "_meta": META}}


def headers_of(message: Mapping[str, Any]) -> dict[str, str]:
    headers = {"MCP-Protocol-Version": "2026-07-28", "Mcp-Method": message["method"]}
    name = message["params"].get("name")
    return headers if name is None else {**headers, "Mcp-Name": name}


async def send(api: Api, message: object, headers: Mapping[str, str] | None = None) -> tuple[int, Any]:
    """Send a message, or bytes as they are; return the status and the answer, None if there is none."""
    body = message if isinstance(message, bytes) else json.dumps(message).encode()
    async with api.client.post("/mcp", data=body, headers={**JSON, **(headers or {})}) as response:
        text = await response.read()
        return response.status, json.loads(text) if text else None


async def refused(api: Api, message: object, headers: Mapping[str, str] | None = None) -> tuple[int, int]:
    """Send what is refused; return the status and the code of the error."""
    status, answer = await send(api, message, headers)
    assert answer["jsonrpc"] == "2.0"
    assert answer["error"]["message"]
    return status, answer["error"]["code"]


# --- Version 2026-07-28 --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "message",
    [modern("server/discover"), modern("tools/list"), modern("tools/call", "a", name="agents", arguments={})],
    ids=lambda message: message["method"],
)
async def test_answers_are_what_the_specification_says(api: Api, message: Object) -> None:
    status, answer = await send(api, message, headers_of(message))
    assert (status, answer["id"], answer["jsonrpc"]) == (200, message["id"], "2.0")
    result = answer["result"]
    assert result["resultType"] == "complete"
    assert result["_meta"]["io.modelcontextprotocol/serverInfo"]["name"] == "telemetryd"
    sdk.validate_server_result(message["method"], "2026-07-28", result)
    sdk.parse_server_result(message["method"], "2026-07-28", result)
    if message["method"] != "tools/call":
        assert (result["ttlMs"] > 0, result["cacheScope"]) == (True, "public")
    else:
        assert json.loads(result["content"][0]["text"]) == result["structuredContent"]


async def test_a_slash_at_the_end_is_ignored_and_other_methods_are_not_allowed(api: Api) -> None:
    message = modern("tools/list")
    async with api.client.post("/mcp/", json=message, headers=headers_of(message)) as response:
        assert response.status == 200
        assert "Mcp-Session-Id" not in response.headers
    for method in ("GET", "DELETE", "PUT"):
        async with api.client.request(method, "/mcp") as response:
            assert (response.status, response.headers["Allow"]) == (405, "POST")


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        ({"MCP-Protocol-Version": None}, -32020),
        ({"MCP-Protocol-Version": "2025-11-25"}, -32020),
        ({"Mcp-Method": None}, -32020),
        ({"Mcp-Method": "tools/list"}, -32020),
        ({"Mcp-Method": "TOOLS/CALL"}, -32020),
        ({"Mcp-Name": None}, -32020),
        ({"Mcp-Name": "stats"}, -32020),
        ({"Mcp-Name": "=?base64?!?="}, -32020),
        ({"Mcp-Name": "=?base64?/w==?="}, -32020),
    ],
)
async def test_headers_say_what_the_message_says(api: Api, changed: dict[str, str | None], code: int) -> None:
    message = modern("tools/call", name="agents")
    headers = {name: value for name, value in {**headers_of(message), **changed}.items() if value is not None}
    assert await refused(api, message, headers) == (400, code)


async def test_a_header_that_is_sent_twice_is_refused(api: Api) -> None:
    message = modern("tools/list")
    headers = [*JSON.items(), *headers_of(message).items(), ("Mcp-Method", "tools/list")]
    async with api.client.post("/mcp", data=json.dumps(message), headers=headers) as response:
        assert (response.status, (await response.json())["error"]["code"]) == (400, -32020)


async def test_an_encoded_name_is_decoded(api: Api) -> None:
    message = modern("tools/call", name="agents")
    encoded = f"=?base64?{base64.b64encode(b'agents').decode()}?="
    assert (await send(api, message, {**headers_of(message), "Mcp-Name": encoded}))[0] == 200


@pytest.mark.parametrize("missing", [[protocol.VERSION_KEY], [protocol.CAPABILITIES_KEY], list(META)])
async def test_a_request_without_its_envelope_is_refused(api: Api, missing: list[str]) -> None:
    message = modern("tools/list")
    message["params"]["_meta"] = {key: value for key, value in META.items() if key not in missing}
    assert await refused(api, message, headers_of(message)) == (400, -32602)
    message["params"]["_meta"] = {**META, **dict.fromkeys(missing, 7)}
    assert (await refused(api, message, headers_of(message)))[0] == 400


@pytest.mark.parametrize("version", ["1900-01-01", "2027-01-01", "x" * 500, ""])
async def test_an_unknown_version_is_told_which_there_are(api: Api, version: str) -> None:
    message = modern("tools/list")
    message["params"]["_meta"] = {**META, protocol.VERSION_KEY: version}
    headers = {**headers_of(message), "MCP-Protocol-Version": version}
    status, answer = await send(api, message, headers)
    assert (status, answer["error"]["code"]) == (400, -32022)
    assert answer["error"]["data"]["supported"] == ["2026-07-28", "2025-11-25", "2025-06-18"]
    del message["params"]["_meta"]
    assert await refused(api, message, headers) == (400, -32022)
    assert await refused(api, {"jsonrpc": "2.0", "method": "notifications/x"}, headers) == (400, -32022)


@pytest.mark.parametrize("method", ["ping", "resources/list", "subscriptions/listen", "logging/setLevel", "é\n"])
async def test_an_unknown_method_is_not_found(api: Api, method: str) -> None:
    message = modern(method)
    headers = {**headers_of(message), "Mcp-Method": method.strip()}
    expected = (404, -32601) if method.isascii() else (400, -32020)
    assert await refused(api, message, headers) == expected


async def test_tools_and_cursors_that_there_are_not_are_refused(api: Api) -> None:
    for message in (
        modern("tools/call", name="sql", arguments={}),
        modern("tools/call", name="agents", arguments=[]),
        modern("tools/call", arguments={}),
        modern("tools/call", name=7),
        modern("tools/list", cursor="x"),
    ):
        headers = {**headers_of(message), "Mcp-Name": str(message["params"].get("name"))}
        assert await refused(api, message, headers) == (400, -32602)


# --- Earlier versions ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "agreed"),
    [
        ("2025-11-25", "2025-11-25"),
        ("2025-06-18", "2025-06-18"),
        ("2024-11-05", "2025-11-25"),
        ("2026-07-28", "2025-11-25"),
    ],
)
async def test_an_earlier_client_agrees_on_a_version_and_goes_on_with_it(api: Api, asked: str, agreed: str) -> None:
    params = {"protocolVersion": asked, "capabilities": {}, "clientInfo": {"name": "old", "version": "1"}}
    status, answer = await send(api, {"jsonrpc": "2.0", "id": 0, "method": "initialize", "params": params})
    assert (status, answer["result"]["protocolVersion"]) == (200, agreed)
    headers = {"MCP-Protocol-Version": agreed}
    assert await send(api, {"jsonrpc": "2.0", "method": "notifications/initialized"}, headers) == (202, None)
    assert (await send(api, {"jsonrpc": "2.0", "id": 1, "method": "ping"}, headers))[1]["result"] == {}
    status, answer = await send(api, {"jsonrpc": "2.0", "id": 2, "method": "tools/list"}, headers)
    assert list(answer["result"]) == ["tools"]
    sdk.validate_server_result("tools/list", agreed, answer["result"])
    call = {"jsonrpc": "2.0", "id": 3, "method": "tools/call", "params": {"name": "agents"}}
    assert (await send(api, call, headers))[1]["result"]["structuredContent"]["total_runs"] == 0
    # These clients take 404 for the end of a session.
    assert await refused(api, {"jsonrpc": "2.0", "id": 4, "method": "resources/list"}, headers) == (200, -32601)
    assert await refused(api, {**call, "params": {"name": "sql"}}, headers) == (200, -32602)
    assert await refused(api, {"jsonrpc": "2.0", "id": 5, "method": "tools/list"}) == (400, -32020)
    assert await refused(api, {"jsonrpc": "2.0", "id": 6, "method": "initialize", "params": {}}) == (200, -32602)


# --- Access --------------------------------------------------------------------------------------


async def test_pages_of_other_origins_and_large_or_strange_bodies_are_refused(api: Api) -> None:
    message = modern("tools/list")
    for origin, status in (
        ("https://evil.example", 403),
        ("null", 403),
        (str(api.client.make_url("")).rstrip("/"), 200),
    ):
        assert (await send(api, message, {**headers_of(message), "Origin": origin}))[0] == status
    assert (await send(api, message, {**headers_of(message), "Host": f"evil.example:{api.client.port}"}))[0] == 403
    assert (await send(api, message, {**headers_of(message), "Content-Type": "text/plain"}))[0] == 415
    large = modern("tools/call", name="agents", arguments={"agent_name": "x" * endpoint.LONGEST_MESSAGE})
    assert (await send(api, large, headers_of(large)))[0] == 413


async def test_too_many_calls_are_refused(make_api: MakeApi) -> None:
    api = await make_api(rate_limit_enabled=True, rate_limit_rpm=2)
    message = modern("tools/list")
    statuses = [(await send(api, message, headers_of(message)))[0] for _ in range(3)]
    assert statuses == [200, 200, 429]


# --- What is no message --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", -32700),
        (b"{", -32700),
        (b"\xff\xfe", -32700),
        (b'{"a": NaN}', -32700),
        (b'"\\ud83d"', -32700),
        (b"[" * 60_000, -32700),
        (b"[]", -32600),
        (b"7", -32600),
        (b"null", -32600),
        (b"[" + json.dumps(modern("tools/list")).encode() + b"]", -32600),
        (b'{"jsonrpc": "1.0", "id": 1, "method": "ping"}', -32600),
        (b'{"jsonrpc": "2.0", "id": null, "method": "ping"}', -32600),
        (b'{"jsonrpc": "2.0", "id": true, "method": "ping"}', -32600),
        (b'{"jsonrpc": "2.0", "id": 1.5, "method": "ping"}', -32600),
        (b'{"jsonrpc": "2.0", "id": 1' + b"0" * 400 + b', "method": "ping"}', -32600),
        (b'{"jsonrpc": "2.0", "id": "' + b"x" * 400 + b'", "method": "ping"}', -32600),
        (b'{"jsonrpc": "2.0", "id": 1, "method": 7}', -32600),
        (b'{"jsonrpc": "2.0", "id": 1, "method": ""}', -32600),
        (b'{"jsonrpc": "2.0", "id": 1, "method": "ping", "params": []}', -32600),
        (b'{"jsonrpc": "2.0", "id": 1, "result": {}}', -32600),
        (b'{"jsonrpc": "2.0", "id": 1, "error": {"code": 1, "message": "x"}}', -32600),
    ],
)
async def test_what_is_no_message_is_refused(api: Api, body: bytes, code: int) -> None:
    assert await refused(api, body) == (400, code)


NAMES = st.sampled_from(["server/discover", "initialize", "ping", "tools/list", "tools/call", "notifications/x"])
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


def values(integers: st.SearchStrategy[int]) -> st.SearchStrategy[Any]:
    leaves = st.none() | st.booleans() | integers | st.floats(allow_nan=False, allow_infinity=False) | TEXTS
    return st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=8
    )


VALUES = values(st.integers())
ARGUMENTS = st.dictionaries(
    st.sampled_from(sorted({name for tool in TOOLS.values() for name in tool.to_json()["inputSchema"]["properties"]}))
    | st.text(max_size=8),
    VALUES,
    max_size=4,
)
PARAMS = st.fixed_dictionaries(
    {},
    optional={
        "name": st.sampled_from([*TOOLS, "sql"]) | VALUES,
        "arguments": ARGUMENTS | VALUES,
        "protocolVersion": st.sampled_from(protocol.SUPPORTED) | VALUES,
        "cursor": VALUES,
        "requestId": VALUES,
        "_meta": st.just(META) | VALUES | st.dictionaries(st.sampled_from(list(META)), VALUES),
    },
)
MESSAGES = st.fixed_dictionaries(
    {"jsonrpc": st.just("2.0") | VALUES},
    optional={"id": st.integers() | st.text(max_size=9) | VALUES, "method": NAMES | VALUES, "params": PARAMS | VALUES},
)


class Nowhere:
    """A database of nothing, that answers any query with a refusal that an assistant is told."""

    async def fetch(self, query: Any) -> Any:
        raise QueryTimeoutError

    async def alerts(self) -> Any:
        raise QueryTimeoutError


@given(
    message=MESSAGES | VALUES,
    version=st.none() | st.sampled_from([*protocol.SUPPORTED, "x"]),
    is_right=st.booleans(),
)
async def test_any_message_is_answered_or_refused(message: Any, version: str | None, is_right: bool) -> None:
    """Without HTTP; below, some of the same over it."""

    async def call(name: str, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        return await tools.call(Nowhere(), name, arguments)

    sent = None
    if version is not None:
        asked = message if isinstance(message, dict) else {}
        params = asked.get("params")
        name = params.get("name") if isinstance(params, dict) else None
        method = asked.get("method")
        sent = protocol.Headers(
            [version],
            [method] if is_right and isinstance(method, str) else [],
            [name] if is_right and isinstance(name, str) else [],
        )
    reply = await protocol.answer(message, call, sent)
    assert reply.status in (200, 202, 400, 404)
    if reply.message is None:
        assert reply.status == 202
        assert "id" not in message
        return
    assert reply.message["jsonrpc"] == "2.0"
    assert ("result" in reply.message) is not ("error" in reply.message)
    if "error" in reply.message:
        assert reply.message["error"]["code"] in protocol._STATUSES
    else:
        assert reply.message["id"] == message["id"]
    json_response(reply.message)


@pytest.fixture(scope="module")
def examples() -> list[Any]:
    """Some messages, always the same ones."""
    found: list[Any] = []

    @given(message=MESSAGES, name=st.sampled_from(list(TOOLS)), arguments=ARGUMENTS)
    def collect(message: Any, name: str, arguments: Any) -> None:
        found.append((message, {}))
        call = modern("tools/call", name=name, arguments=arguments)
        found.append((call, headers_of(call)))

    collect()
    return found


async def test_no_message_makes_an_error_of_the_daemon(api: Api, examples: list[tuple[Any, dict[str, str]]]) -> None:
    await api.post(make_run(status="failure", error_summary="boom"))
    assert len(examples) > 100
    for message, headers in examples:
        status, answer = await send(api, message, headers)
        assert status in (200, 202, 400, 404, 413), (message, status)
        assert answer is None or len(json.dumps(answer)) < 4 * bounds.MOST_BYTES


# --- Parts ---------------------------------------------------------------------------------------


@given(st.dictionaries(TEXTS, values(st.integers(-(2**63), 2**63 - 1)), max_size=5), st.integers(200, 2000))
def test_answers_of_any_content_fit(content: Object, most: int) -> None:
    listed = [content] * 50
    kept = bounds.fit({"list": listed, "other": listed[:10]}, most)
    size = len(orjson.dumps(kept))
    assert size <= most
    assert kept.get("left_out", {}).get("list", 0) == 50 - len(kept["list"])


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1, max_size=50_000))
def test_a_run_of_long_texts_fits(text: str) -> None:
    run = {f"field_{number}": text * (40_000 // len(text)) for number in range(50)}
    assert len(json.dumps(bounds.fit(run), ensure_ascii=False).encode()) < bounds.MOST_BYTES * 1.1


@given(ARGUMENTS)
def test_arguments_become_a_query_string_or_a_sentence(arguments: Object) -> None:
    for tool in TOOLS.values():
        try:
            made = query_string(arguments, tool.parameters)
        except InvalidRequestError as error:
            made = str(error)
        assert isinstance(made, str)
