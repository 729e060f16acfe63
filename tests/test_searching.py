"""Searching: what is found in a large text is what SQLite finds in a small one, and no search takes one long step."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from telemetryd.engine.sqlite import searching
from telemetryd.engine.sqlite.readers import Readers
from tests.conftest import Api, make_run

SIGNS = st.text(st.sampled_from("aAbBsSſkKäÄßµμ%_*?[]^-\\ 漢😀"), max_size=8)
ALMOST = ("a" * 200 + "b", "ä" * 200 + "b")


@pytest.fixture(params=["UTF-8", "UTF-16le", "UTF-16be"], scope="module")
def plain(request: pytest.FixtureRequest) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.execute(f"PRAGMA encoding = '{request.param}'")
        connection.execute("CREATE TABLE texts (said TEXT)")
        searching.add_to(connection, lambda: False)
        yield connection


def found(connection: sqlite3.Connection, said: str, text: str) -> bool:
    where, values = searching.condition("said", text)
    connection.execute("DELETE FROM texts")
    connection.execute("INSERT INTO texts VALUES (?)", (said,))
    return bool(connection.execute(f"SELECT {where} FROM texts", values).fetchone()[0])


@given(SIGNS, SIGNS.filter(bool), st.integers(0, 3))
@example("xſy", "SſK", 0)
@example("aſk", "SSſ", 0)
def test_a_large_text_is_searched_as_a_small_one_is(plain: sqlite3.Connection, said: str, text: str, cut: int) -> None:
    said = said + text[cut:].swapcase() + said
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(searching, "LARGE_BYTES", -1)
        patch.setattr(searching, "_PIECE_BYTES", 3)  # signs of UTF-8 and pairs of UTF-16 are cut through
        large = found(plain, said, text)
    assert large is found(plain, said, text)


@pytest.mark.parametrize("text", ALMOST, ids=["ascii", "other"])
async def test_what_nearly_matches_everywhere_is_distinguished_from_what_does(api: Api, text: str) -> None:
    nearly = text[0] * 20_000
    await api.post(make_run(event_id="nearly", error_details=nearly, error_summary="x"))
    await api.post(make_run(event_id="really", error_details=nearly + text.swapcase() + nearly))
    listed = await api.get("/api/v1/runs", params={"error": text, "fields": "event_id"})
    assert listed == [{"event_id": "really"}]


async def test_a_search_in_a_large_text_ends_when_its_caller_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searching, "_PIECE_BYTES", 1)  # so that a text of 8 MB takes many seconds
    began = threading.Event()

    def search(connection: sqlite3.Connection) -> None:
        began.set()
        connection.execute(f"SELECT {searching.FUNCTION}(zeroblob(8000000), 'x')").fetchone()

    path = tmp_path / "telemetry.sqlite"
    sqlite3.connect(path).close()
    readers = await Readers.open(path, 1, 5, 1000)
    try:
        left = asyncio.create_task(readers.fetch(search))
        await asyncio.to_thread(began.wait)
        left.cancel()
        assert await readers.fetch(lambda connection: connection.execute("SELECT 1").fetchone()) == (1,)
    finally:
        await readers.close()


def test_each_step_is_short_however_large_the_text() -> None:
    asked: list[int] = []

    def is_over() -> bool:
        asked.append(1)
        return False

    search = partial(searching.holds, encoding="utf-8", is_over=is_over)
    assert not search(b"a" * 10_000_000, ALMOST[0])
    assert len(asked) > 100
