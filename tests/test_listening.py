from __future__ import annotations

import socket
from pathlib import Path

import pytest

from telemetryd.errors import AddressError
from telemetryd.settings import Settings
from telemetryd.web.listening import bound
from tests.conftest import StartDaemon
from tests.http_client import get
from tests.tools.process import telemetryd


async def refusal(folder: Path, host: str = "127.0.0.1", port: int = 0, unix: str | None = None) -> str:
    settings = Settings(
        db_path=folder / "telemetry.sqlite", api_host=host, api_port=port, api_unix=Path(unix) if unix else None
    )
    with pytest.raises(AddressError) as caught:
        async with bound(settings):
            pytest.fail("it was bound")
    assert "\n" not in str(caught.value)
    return str(caught.value)


async def test_an_address_that_cannot_be_used_is_named_with_the_reason(tmp_path: Path) -> None:
    for host in ("192.0.2.1", "no-such-host.invalid", "a" * 100):
        told = await refusal(tmp_path, host, 8765)
        assert told == f"Cannot listen on {host}:8765: that is no address of this machine (TELEMETRY_API_HOST)"


async def test_a_port_in_use_is_named_with_what_to_do(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        told = await refusal(tmp_path, port=port)
        assert told.startswith(f"Cannot listen on 127.0.0.1:{port}: port {port} is already in use")
        assert "--port" in told


async def test_a_unix_socket_that_cannot_be_made_is_named_with_the_reason(tmp_path: Path) -> None:
    start = f"Cannot listen on the Unix socket {tmp_path}"
    told = await refusal(tmp_path, unix=f"{tmp_path}/none/sock")
    assert told.startswith(f"{start}/none/sock: the directory {tmp_path}/none does not exist; make it: mkdir -p")
    (tmp_path / "file").write_text("precious")
    assert "not a socket" in await refusal(tmp_path, unix=f"{tmp_path}/file")
    assert (await refusal(tmp_path, unix=f"{tmp_path}/file/sock")).startswith(f"{start}/file/sock: ")
    assert (await refusal(tmp_path, unix=f"{tmp_path}/{'x' * 150}")).startswith(f"{start}/xxx")
    assert (tmp_path / "file").read_text() == "precious"


async def test_a_socket_at_which_somebody_listens_is_left_to_him(tmp_path: Path) -> None:
    path = tmp_path / "sock"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        assert "another process listens there" in await refusal(tmp_path, unix=str(path))
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))  # it still leads to him
            other.accept()[0].close()
    settings = Settings(db_path=tmp_path / "telemetry.sqlite", api_host="127.0.0.1", api_port=0, api_unix=path)
    async with bound(settings):  # nobody listens there any more
        assert path.is_socket()


async def test_the_unix_sockets_file_goes_with_its_owner_but_not_that_of_a_successor(tmp_path: Path) -> None:
    path = tmp_path / "sock"
    settings = Settings(db_path=tmp_path / "telemetry.sqlite", api_host="127.0.0.1", api_port=0, api_unix=path)
    async with bound(settings):
        assert path.stat().st_mode & 0o777 == 0o660
    assert not path.exists()
    async with bound(settings):
        path.unlink()
        path.write_text("another's")
    assert path.read_text() == "another's"


def test_two_colons_are_every_address_of_both_kinds(start_daemon: StartDaemon) -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    daemon = start_daemon("--host", "::")
    port = daemon.url.rpartition(":")[2]
    for host in ("127.0.0.1", "[::1]"):
        assert get(f"http://{host}:{port}", "/api/v1/metadata")[0] == 200
    assert daemon.stop() == 0
    assert [line["client"] for line in daemon.lines if "client" in line] == ["127.0.0.1", "::1"]


def test_a_start_that_finds_its_port_in_use_leaves_nothing_behind(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        flags = ("--host", "127.0.0.1", "--unix", "sock", "--db-path", "data/telemetry.sqlite", "--port", port)
        done = telemetryd("serve", *flags, status=1, cwd=tmp_path)
    assert done.stderr.startswith("telemetryd: Cannot listen on 127.0.0.1:")
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []
