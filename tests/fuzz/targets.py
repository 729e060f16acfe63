"""What is fuzzed: what lies between bytes and a command, a query or a token. Bad input has its own errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import orjson

from telemetryd.engine.sqlite.statements.runs import select_page
from telemetryd.errors import BodyTooLargeError, ConfigurationError, InvalidBodyError, InvalidRequestError
from telemetryd.model import bodies, queries, runs, tokens, values
from telemetryd.model.commands import CreateRuns

CORPUS: Final = Path(__file__).with_name("corpus")


def body(data: bytes) -> None:
    """Read bytes as each kind of body; whatever is let through must be storable."""
    try:
        value = bodies.parse_body(data)
    except (InvalidBodyError, BodyTooLargeError) as error:
        orjson.dumps(str(error))
        return
    for parse in (runs.parse_patch, runs.parse_commit):
        try:
            changes, ignored = parse(value)
        except InvalidBodyError as error:
            orjson.dumps(error.errors)
        else:
            assert all(_is_storable(change) for change in changes.values())
            orjson.dumps(runs.ignored_field_warnings(ignored))
    for item in value if isinstance(value, list) else [value]:
        try:
            parsed = runs.parse_run(item)
        except InvalidBodyError as error:
            orjson.dumps(error.errors)
            continue
        assert CreateRuns((parsed.row,)).cost == 1
        assert all(map(_is_storable, parsed.row))
        assert len(parsed.row) == len(runs.STORED)
        assert parsed.row[runs.STATUS] in set(values.Status)
        orjson.dumps(runs.ignored_field_warnings(parsed.ignored))


def _is_storable(value: object) -> bool:
    if isinstance(value, str):
        value.encode()
        return "\0" not in value
    return value is None or (isinstance(value, int) and -(2**63) <= value < 2**63)


def query(data: bytes) -> None:
    """Read bytes as the query string of GET /api/v1/runs, and continue after its first page."""
    text = data.decode("latin-1")
    try:
        listed = queries.parse_list(text)
    except InvalidRequestError as error:
        orjson.dumps(str(error))
        return
    select_page(listed)
    following = listed.next_page("/api/v1/runs", queries.Position("2026-01-01T00:00:00.000000Z", 5))
    again = queries.parse_list(following.partition("?")[2])
    assert (again.filters, again.limit) == (listed.filters, listed.limit)
    orjson.dumps(listed.parameters())


def token_file(data: bytes) -> None:
    """Read bytes as a file of tokens; what is let through is written as it was read, and errors show no hash."""
    try:
        found = tokens.parse(data, "tokens")
    except ConfigurationError as error:
        orjson.dumps(error.problems)
        return
    assert tokens.parse(tokens.render(found), "tokens") == found
    for token in found:
        assert token.hash not in repr(token) + str(token.to_json())


TARGETS: Final[Mapping[str, Callable[[bytes], None]]] = {"body": body, "query": query, "token_file": token_file}
