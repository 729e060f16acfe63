"""docs/how-to/mcp.md says what there is: tools, arguments, versions, and examples that work as they stand there."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
from pathlib import Path
from typing import Final

from telemetryd.mcp import bounds, endpoint, protocol, tools
from tests.conftest import Api
from tests.mcp.assistants import assistant

PAGE: Final = (Path(__file__).parents[2] / "docs" / "how-to" / "mcp.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_it_names_every_tool_with_its_arguments_and_the_bounds() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", PAGE, re.MULTILINE))
    assert set(rows) == set(tools.TOOLS)
    for tool in tools.TOOLS.values():
        named = re.findall(r"`(\w+)`", rows[tool.name])
        known = tool.to_json()["inputSchema"]["properties"]
        assert set(named) <= set(known)
        assert named == list(known) or "those of" in rows[tool.name] or "the filters of" in rows[tool.name] or not known
    for bound in (
        f"{bounds.MOST_BYTES // 1024} KiB of JSON",
        "to {:,}, {:,} or {:,} characters".format(*bounds.TEXTS),
        f"A call takes {tools.DEADLINE_S:.0f} s",
        f"A message holds {endpoint.LONGEST_MESSAGE // 1024} KiB",
        f"{tools.DEFAULT_LIMIT} by default and {tools.MAX_LIMIT} at most",
        f"versions | {protocol.MODERN}",
        " or ".join(protocol.EARLIER),
    ):
        assert bound in PAGE, bound


async def test_its_examples_work(api: Api) -> None:
    url = str(api.client.make_url("")).rstrip("/")
    for text in blocks("json"):
        [(name, server)] = json.loads(text)["mcpServers"].items()
        assert name == "telemetryd"
        assert "command" in server or server["url"].endswith(endpoint.PATH)
    async with assistant(url, headers={"Authorization": "Bearer tmd_any"}) as client:
        assert len((await client.list_tools()).tools) == len(tools.TOOLS)
    [command] = blocks("bash")
    asked = ["bash", "-c", command.replace("http://localhost:8765", url)]
    out = await asyncio.to_thread(subprocess.run, asked, capture_output=True, check=True)
    assert json.loads(out.stdout)["result"]["structuredContent"]["total_runs"] == 0
