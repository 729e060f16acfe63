"""One app for all the tests of a module: for tables of input that must leave it as it was."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import cast

import pytest
import pytest_asyncio
from aiohttp.test_utils import TestClient

from telemetryd.http import make_app
from telemetryd.ops.metrics import Metrics
from telemetryd.settings import Settings
from telemetryd.store import Store
from tests.conftest import Api, Client, DaemonServer, engine_settings


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(
    request: pytest.FixtureRequest, engine: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Api]:
    """An app that all the tests of a module share; they mark themselves with loop_scope="module"."""
    with engine_settings(request, engine, tmp_path_factory.mktemp("shared")) as given:
        settings = Settings(**given)
        metrics = Metrics()
        store = await Store.open(settings, metrics)
        client = cast("Client", TestClient(DaemonServer(make_app(store, settings, metrics), settings)))
        async with client:
            yield Api(client, store, settings)
        await store.close()
