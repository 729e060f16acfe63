"""An assistant: the official SDK's client, over HTTP and over the standard streams of a process."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import httpx2
from mcp import Client, StdioServerParameters
from mcp.client.streamable_http import streamable_http_client

VERSIONS: Final = {"auto": "2026-07-28", "legacy": "2025-11-25"}
"""What the client agrees on with the daemon, by how it begins."""


@asynccontextmanager
async def assistant(url: str, mode: str = "auto", headers: dict[str, str] | None = None) -> AsyncIterator[Client]:
    """Give a client of the daemon at an address."""
    # The tests' SSL_CERT_FILE is empty, and to begin, even http needs the certificates of the authorities.
    async with httpx2.AsyncClient(verify=False, headers=headers, timeout=60) as session:
        transport = streamable_http_client(f"{url}/mcp", http_client=session)
        async with Client(transport, mode=mode) as client:
            yield client


@asynccontextmanager
async def assistant_of_command(*flags: str, mode: str = "auto", **variables: str) -> AsyncIterator[Client]:
    """Give a client of `telemetryd mcp`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TELEMETRY_")}
    server = StdioServerParameters(
        command=sys.executable, args=["-m", "telemetryd", "mcp", *flags], env={**environment, **variables}
    )
    async with Client(server, mode=mode) as client:
        yield client


async def ask(client: Client, tool: str, **arguments: Any) -> dict[str, Any]:
    """Call a tool, and return its answer; the client has checked it against the tool's schema."""
    result = await client.call_tool(tool, arguments)
    assert not result.is_error, result.content
    answer: dict[str, Any] = result.structured_content
    return answer


async def complaint(client: Client, tool: str, **arguments: Any) -> str:
    """Call a tool that cannot answer, and return what it says of that."""
    result = await client.call_tool(tool, arguments)
    assert result.is_error
    return str(result.content[0].text)  # type: ignore[union-attr]
