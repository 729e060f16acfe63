"""TLS: whom the daemon lets in, what a client learns that is kept out, and a certificate that is renewed meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import logging
import os
import re
import signal
import socket
import ssl
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, cast

import aiohttp
import orjson
import pytest
import trustme
import uvloop
from aiohttp import web

from telemetryd.cli import reach
from telemetryd.cli.reach import Where, local_url
from telemetryd.client.address import disconnected, why
from telemetryd.client.client import Client
from telemetryd.client.config import Config
from telemetryd.client.transport import Transport, UnreachableError, run_path
from telemetryd.configuration import load
from telemetryd.daemon import Running, running
from telemetryd.errors import ConfigurationError
from telemetryd.settings import Settings
from telemetryd.web import connections
from telemetryd.web import tls as tls_module
from telemetryd.web.connections import ConnectionBounds
from telemetryd.web.secure import Handshakes, SecureConnection
from telemetryd.web.tls import Tls, read_identity
from tests.conftest import Daemon, StartDaemon, eventually, make_run, wait_until
from tests.contract.test_access import own_address
from tests.needs import require_program
from tests.tools.process import telemetryd

YESTERDAY: Final = datetime.now(UTC) - timedelta(days=1)
both_loops = pytest.mark.parametrize(
    "new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"]
)


class Folder:
    """Certificates as files: of an authority of ours, and of one that nobody knows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ours, self.other = trustme.CA(), trustme.CA()
        self.ca = self._write("ca.pem", self.ours.cert_pem)
        self.other_ca = self._write("other-ca.pem", self.other.cert_pem)

    def _write(self, name: str, *blobs: trustme.Blob) -> Path:
        path = self.path / name
        path.write_bytes(b"".join(blob.bytes() for blob in blobs))
        path.chmod(0o600)
        return path

    def cert(self, name: str, *identities: str, ca: trustme.CA | None = None, **more: Any) -> Path:
        """Return the file of a new certificate and its key."""
        made = (ca or self.ours).issue_cert(*identities or ("localhost", "127.0.0.1"), **more)
        return self._write(name, made.private_key_pem, *made.cert_chain_pems)

    def settings(self, **values: Any) -> Settings:
        return Settings(db_path=self.path / "telemetry.sqlite", api_host="127.0.0.1", api_port=0, **values)

    def config(self, url: str, **values: Any) -> Config:
        return Config(**{"url": url, "ca_file": self.ca, "timeout_s": 20.0, **values})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return Folder(tmp_path_factory.mktemp("certificates"))


def renew(tls: Tls, settings: Settings) -> None:
    put_into_use = tls.prepare(settings)
    assert put_into_use is not None
    put_into_use()


def client_context(ca: Path, cert: Path | None = None, version: ssl.TLSVersion | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(ca))
    if cert is not None:
        context.load_cert_chain(cert)
    if version is not None:
        context.minimum_version = context.maximum_version = version
    return context


def words(config: Config) -> str:
    """Ask for the health; return what the client says of it."""
    with contextlib.closing(Transport(config)) as transport:
        try:
            return str(transport.request("GET", "/health").status)
        except UnreachableError as error:
            return str(error)


def metrics_of(socket_path: Path) -> list[str]:
    """Return the lines of `/metrics`, asked for over the Unix socket."""
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as sock:
        sock.connect(str(socket_path))
        sock.sendall(b"GET /metrics?format=prometheus HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        with sock.makefile("r") as answer:
            return answer.read().splitlines()


def failed_handshakes(socket_path: Path) -> dict[str, float]:
    """Return how many handshakes have failed, by reason."""
    lines = [line for line in metrics_of(socket_path) if line.startswith("telemetryd_tls_handshakes_failed_total{")]
    return {line.split('"')[1]: float(line.rpartition(" ")[2]) for line in lines}


# --- Files ---------------------------------------------------------------------------------------


def test_files_that_cannot_be_used_are_named_with_their_variable(folder: Folder, tmp_path: Path) -> None:
    good, other = folder.cert("good.pem"), folder.cert("other.pem")
    (tmp_path / "text").write_text("no PEM at all")
    (tmp_path / "broken").write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    (open_key := tmp_path / "open.pem").write_bytes(good.read_bytes())
    open_key.chmod(0o604)
    (locked := tmp_path / "locked.pem").touch(0o600)
    require_program("openssl", "openssl")
    make = ["openssl", "ec", "-aes256", "-passout", "pass:secret", "-in", str(good), "-out", str(locked)]
    subprocess.run(make, check=True, capture_output=True)
    (unfit := tmp_path / "unfit.pem").touch(0o600)
    make = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-subj",
        "/CN=x",
        "-addext",
    ]
    make += ["extendedKeyUsage=clientAuth", "-keyout", "-", "-out", "-"]
    unfit.write_bytes(subprocess.run(make, check=True, capture_output=True).stdout)
    (rsa := tmp_path / "rsa.pem").touch(0o600)
    make = ["openssl", "genpkey", "-algorithm", "RSA", "-out", str(rsa)]
    subprocess.run(make, check=True, capture_output=True)
    os.mkfifo(pipe := tmp_path / "pipe", 0o600)  # to open it would wait for ever
    half = tmp_path / "half.pem"
    half.write_text(good.read_text()[good.read_text().index("-----BEGIN CERTIFICATE") :][:300])
    none, text, broken = tmp_path / "none", tmp_path / "text", tmp_path / "broken"
    cases: list[tuple[dict[str, Path], str]] = [
        ({"tls_cert": none}, f"TELEMETRY_TLS_CERT: {none}: cannot be read: No such file"),
        ({"tls_cert": tmp_path}, f"TELEMETRY_TLS_CERT: {tmp_path}: is no regular file"),
        ({"tls_cert": text}, f"TELEMETRY_TLS_CERT: {text}: holds no certificate in PEM"),
        ({"tls_cert": broken, "tls_key": good}, f"TELEMETRY_TLS_CERT: {broken}: cannot be used"),
        ({"tls_cert": folder.ca}, "TELEMETRY_TLS_CERT: .* holds no private key, and TELEMETRY_TLS_KEY names no file"),
        ({"tls_cert": good, "tls_key": folder.ca}, f"TELEMETRY_TLS_KEY: {folder.ca}: holds no private key in PEM"),
        ({"tls_cert": good, "tls_key": other}, f"TELEMETRY_TLS_KEY: {other}: the private key does not fit .*{good}"),
        ({"tls_cert": good, "tls_key": rsa}, f"TELEMETRY_TLS_KEY: {rsa}: the private key does not fit .*{good}"),
        ({"tls_cert": half, "tls_key": good}, f"TELEMETRY_TLS_CERT: {half}: cannot be used: .* cut off or damaged"),
        ({"tls_cert": pipe}, f"TELEMETRY_TLS_CERT: {pipe}: is no regular file"),
        ({"tls_cert": good, "tls_key": pipe}, f"TELEMETRY_TLS_KEY: {pipe}: is no regular file"),
        ({"tls_cert": good, "tls_client_ca": pipe}, f"TELEMETRY_TLS_CLIENT_CA: {pipe}: is no regular file"),
        ({"tls_cert": good, "tls_key": locked}, f"TELEMETRY_TLS_KEY: {locked}: the private key is encrypted"),
        ({"tls_cert": open_key}, f"TELEMETRY_TLS_CERT: {open_key}: .* others can use: chmod 600"),
        (
            {"tls_cert": unfit},
            f"TELEMETRY_TLS_CERT: {unfit}: no client would accept it: unsuitable certificate purpose",
        ),
        ({"tls_cert": good, "tls_client_ca": none}, f"TELEMETRY_TLS_CLIENT_CA: {none}: cannot be read"),
        ({"tls_cert": good, "tls_client_ca": text}, f"TELEMETRY_TLS_CLIENT_CA: {text}: holds no certificate"),
        ({"tls_cert": good, "tls_client_ca": broken}, f"TELEMETRY_TLS_CLIENT_CA: {broken}: cannot be used"),
    ]
    for files, problem in cases:
        with pytest.raises(ConfigurationError, match=f"^{problem}") as caught:
            read_identity(folder.settings(**files))
        assert len(caught.value.problems) == 1
    with pytest.raises(ConfigurationError) as caught:
        Tls(folder.settings(tls_cert=tmp_path / "none", tls_client_ca=tmp_path / "none"))
    assert len(caught.value.problems) == 2
    for variable in ("TELEMETRY_TLS_KEY", "TELEMETRY_TLS_CLIENT_CA"):
        with pytest.raises(ConfigurationError, match=f"TELEMETRY_TLS_CERT: must be set when {variable} is"):
            load({}, {variable: str(good)}, None)
    os.chmod(good, 0o640)
    os.chown(good, os.getuid(), os.getgid())
    if os.getuid() == 0:  # as LoadCredential= of systemd and secrets of Kubernetes give it
        assert read_identity(folder.settings(tls_cert=good)) is not None
    else:
        with pytest.raises(ConfigurationError, match="others can use"):
            read_identity(folder.settings(tls_cert=good))


@pytest.mark.parametrize("step", ["_is_open_to_others", "_names_and_end"])
def test_a_file_that_vanishes_while_it_is_read_leaves_the_old_certificate(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    cert = folder.cert("vanishing.pem")
    tls, carry_out = Tls(folder.settings(tls_cert=cert)), getattr(tls_module, step)
    before = tls.identity

    def vanish(*arguments: Path) -> object:
        cert.unlink()
        return carry_out(*arguments)

    monkeypatch.setattr(tls_module, step, vanish)
    with pytest.raises(ConfigurationError, match="TELEMETRY_TLS_CERT: cannot be read: No such file"):
        tls.prepare(folder.settings(tls_cert=cert))
    assert tls.identity is before


def test_an_expired_certificate_is_a_warning_and_its_names_are_known(
    folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    tls = Tls(folder.settings(tls_cert=folder.cert("names.pem", "Host.example.org", "*.a.example.org", "10.0.0.1")))
    assert tls.identity is not None
    assert tls.identity.is_for("host.example.org")
    assert tls.identity.is_for("b.a.example.org")
    assert not tls.identity.is_for("c.b.a.example.org")
    assert not tls.identity.is_for("example.org")
    assert not caplog.records
    old = folder.settings(tls_cert=folder.cert("expired.pem", not_after=YESTERDAY))
    with caplog.at_level(logging.WARNING):
        renew(tls, old)
        Tls(old)
    assert [record.message for record in caplog.records] == [
        "The TLS certificate has expired; clients do not accept it"
    ] * 2


def test_a_client_says_what_is_wrong_with_the_certificate_of_the_daemon(folder: Folder) -> None:
    expired = folder.settings(tls_cert=folder.cert("expired.pem", not_after=YESTERDAY))
    early = folder.settings(tls_cert=folder.cert("early.pem", not_before=datetime.now(UTC) + timedelta(days=1)))
    named = folder.settings(tls_cert=folder.cert("named.pem", "elsewhere.example"))

    async def main() -> None:
        tls = Tls(expired)
        handshakes = Handshakes(tls, Echo, lambda: False, lambda _: None, patience_s=20, most_bytes=1 << 30)
        async with await asyncio.get_running_loop().create_server(handshakes, "127.0.0.1", 0) as server:
            config = folder.config(f"https://localhost:{server.sockets[0].getsockname()[1]}")
            assert "certificate has expired; the daemon needs a new one" in await asyncio.to_thread(words, config)
            renew(tls, early)
            assert "not yet valid; is the clock" in await asyncio.to_thread(words, config)
            renew(tls, named)
            assert "Hostname mismatch, " in (said := await asyncio.to_thread(words, config))
            assert said.endswith("reach the daemon by a name that its certificate holds")

    run(asyncio.new_event_loop, main())


def test_tls_is_switched_on_or_off_by_a_restart_only(folder: Folder) -> None:
    plain, secured = folder.settings(), folder.settings(tls_cert=folder.cert("switched.pem"))
    for before, after in ((plain, secured), (secured, plain)):
        with pytest.raises(ConfigurationError, match="only by a restart"):
            Tls(before).prepare(after)
    assert Tls(plain).prepare(plain) is None


# --- Clients and what they learn -----------------------------------------------------------------


@pytest.fixture(scope="module")
def mutual(folder: Folder) -> Iterator[Daemon]:
    """A daemon on every address that asks each client for a certificate, and for nothing else."""
    daemon = Daemon(
        folder.path,
        TELEMETRY_TLS_CERT=str(folder.cert("daemon.pem", "localhost", "daemon.example")),
        TELEMETRY_TLS_CLIENT_CA=str(folder.ca),
        TELEMETRY_DB_JOURNAL_MODE="WAL",
    )
    yield daemon
    daemon.stop()
    daemon.close()


def test_a_client_without_a_certificate_that_is_accepted_learns_why(folder: Folder, mutual: Daemon) -> None:
    mine = folder.cert("agent.pem", "agent@example.org")
    expired = folder.cert("old-agent.pem", "agent@example.org", not_after=YESTERDAY)
    foreign = folder.cert("foreign.pem", "agent@example.org", ca=folder.other)
    url, port = mutual.url, mutual.url.rpartition(":")[2]
    assert words(folder.config(url, client_cert=mine)) == "200"
    said = {
        "it asks for a client certificate: .*--client-cert": folder.config(url),
        "it does not accept the client certificate: unknown ca": folder.config(url, client_cert=foreign),
        "it does not accept the client certificate: certificate expired": folder.config(url, client_cert=expired),
        "not accepted: self-signed certificate in .* --ca": folder.config(url, ca_file=folder.other_ca),
        "not accepted: IP address mismatch, .* by a name that": folder.config(f"https://127.0.0.1:{port}"),
        "without an answer; is https:// meant": folder.config(f"http://localhost:{port}"),
    }
    own_socket = folder.path / "telemetry.sqlite.sock"
    before = failed_handshakes(own_socket)
    for pattern, config in said.items():
        assert re.search(f"^{config.url}: .*{pattern}", words(config)), words(config)
    expected = {"no_client_certificate": 1, "client_certificate": 2, "refused_by_client": 2, "plain_http": 1}

    def are_counted() -> bool:  # a client that does not accept the certificate has said so when nobody waits any more
        counted = failed_handshakes(own_socket)
        return all(counted.get(reason, 0) == before.get(reason, 0) + number for reason, number in expected.items())

    wait_until(are_counted)
    assert mutual.wait_for_line("TLS handshakes failed")["last_client"] == "127.0.0.1"
    expires = datetime.fromisoformat(mutual.wait_for_line("TLS certificate in use")["expires"]).timestamp()
    shown = next(line for line in metrics_of(own_socket) if line.startswith("telemetryd_tls_certificate_expires"))
    assert float(shown.split()[1]) == expires


def test_nothing_is_lost_while_a_certificate_is_not_accepted(
    folder: Folder, mutual: Daemon, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sent, mine = make_run(), folder.cert("agent.pem", "agent@example.org")
    with Client(mutual.url, ca_file=folder.other_ca, client_cert=mine, buffer_dir=tmp_path) as client:
        client.record(sent)
        wait_until(lambda: any("its certificate is not accepted: self-signed" in line for line in caplog.messages))
    daemon = ("--url", mutual.url, "--ca", folder.ca, "--client-cert", mine)
    telemetryd("sync", "--buffer-dir", tmp_path, *daemon, cwd=tmp_path)
    with contextlib.closing(Transport(folder.config(mutual.url, client_cert=mine))) as transport:
        assert transport.request("GET", run_path(sent["event_id"])).status == 200


def test_a_client_reads_its_certificate_again_when_it_was_not_accepted(folder: Folder, mutual: Daemon) -> None:
    file = folder.cert("renewed-agent.pem", "agent@example.org", not_after=YESTERDAY)
    with contextlib.closing(Transport(folder.config(mutual.url, client_cert=file))) as transport:
        with pytest.raises(UnreachableError, match="expired"):
            transport.request("GET", "/health")
        folder.cert("renewed-agent.pem", "agent@example.org")
        assert transport.request("GET", "/health").status == 200


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1")
def test_nothing_older_than_tls_1_2_is_spoken(folder: Folder, mutual: Daemon) -> None:
    port, mine = int(mutual.url.rpartition(":")[2]), folder.cert("agent.pem", "agent@example.org")
    for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        context = client_context(folder.ca, mine, version)
        context.set_alpn_protocols(["h2", "http/1.1"])
        with connected(port, context) as sock:
            assert sock.selected_alpn_protocol() == "http/1.1"
            assert ask(sock).startswith(b"HTTP/1.1 200 ")
    old = client_context(folder.ca, mine, ssl.TLSVersion.TLSv1_1)
    old.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.raises(ssl.SSLError, match="ALERT_PROTOCOL_VERSION"), connected(port, old):
        pass
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(b"\0" * 100)
        sock.settimeout(20)
        assert sock.recv(1) == b""
    wait_until(
        lambda: failed_handshakes(folder.path / "telemetry.sqlite.sock").items() >= {"version": 1, "not_tls": 1}.items()
    )


def test_an_answer_that_comes_before_the_end_of_a_request_arrives_whole(folder: Folder, mutual: Daemon) -> None:
    context = client_context(folder.ca, folder.cert("agent.pem", "agent@example.org"))
    with connected(int(mutual.url.rpartition(":")[2]), context) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"x" * 200_000)
        answer = b"".join(iter(lambda: sock.recv(1 << 16), b""))
        sock.sendall(b"x" * 1_000_000)  # is let go
        assert answer.startswith(b"HTTP/1.0 431 ")
        assert answer.endswith(b'in a line"}')


def test_a_record_that_was_changed_on_its_way_ends_the_connection(folder: Folder, mutual: Daemon) -> None:
    context = client_context(folder.ca, folder.cert("agent.pem", "agent@example.org"))
    with connected(int(mutual.url.rpartition(":")[2]), context) as sock:
        assert ask(sock).startswith(b"HTTP/1.1 200 ")
        with socket.socket(fileno=os.dup(sock.fileno())) as between:
            between.sendall(b"\x17\x03\x03\x00\x20" + b"x" * 32)
        with pytest.raises(ssl.SSLError, match="ALERT_BAD_RECORD_MAC"):
            sock.recv(1)
    assert not [line for line in mutual.lines if line["level"] in ("ERROR", "CRITICAL")]


@contextlib.contextmanager
def connected(
    port: int, context: ssl.SSLContext, address: str = "127.0.0.1", name: str = "localhost", **more: Any
) -> Iterator[ssl.SSLSocket]:
    with (
        socket.create_connection((address, port), timeout=20) as sock,
        context.wrap_socket(sock, server_hostname=name, **more) as secured,
    ):
        yield secured


def ask(sock: ssl.SSLSocket, path: str = "/health", host: str = "localhost", method: str = "GET") -> bytes:
    """Send a request without a body; return the begin of the answer, which is small."""
    sock.sendall(f"{method} {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    return sock.recv(1 << 16)


def test_a_client_with_a_certificate_is_served_like_one_on_this_machine(
    folder: Folder, mutual: Daemon, start_daemon: StartDaemon
) -> None:
    address, port = own_address(), int(mutual.url.rpartition(":")[2])
    context = client_context(folder.ca, folder.cert("agent.pem", "agent@example.org"))
    runs = "/api/v1/runs"
    with connected(port, context, address, "daemon.example") as sock:
        assert ask(sock, runs, f"daemon.example:{port}").startswith(b"HTTP/1.1 200 ")
        assert ask(sock, runs, f"{address}:{port}").startswith(b"HTTP/1.1 200 ")
        assert b"is not a name of this daemon" in ask(sock, runs, f"evil.example:{port}")
        assert b"Admin endpoints need authentication" in ask(sock, "/api/v1/admin/reap", method="POST")
    url = start_daemon(TELEMETRY_TLS_CERT=str(folder.cert("alone.pem"))).url
    port = int(url.rpartition(":")[2])
    with connected(port, context, address) as sock:  # this one asks for no certificate, so nobody has shown any
        assert b"TELEMETRY_TLS_CLIENT_CA" in ask(sock, runs)
    with connected(port, context) as sock:
        assert ask(sock, runs).startswith(b"HTTP/1.1 200 ")


# --- Commands ------------------------------------------------------------------------------------


def test_commands_show_a_certificate_and_say_what_is_wrong_with_it(folder: Folder, mutual: Daemon) -> None:
    mine = folder.cert("agent.pem", "agent@example.org")
    daemon = ("--url", mutual.url, "--ca", folder.ca)
    commands = (("stats",), ("tail",), ("export", "-"), ("demo", "--no-live", "--runs", "2"))
    for command in commands:
        refused = telemetryd(*command, *daemon, cwd=folder.path, status=1).stderr.splitlines()[-1]
        assert "it asks for a client certificate: name its file with --client-cert" in refused, refused
        assert "trying again" not in refused
    for command in commands[::-1]:
        telemetryd(*command, *daemon, "--client-cert", mine, cwd=folder.path)
    key = folder.path / "agent.key"
    key.write_text(mine.read_text().partition("-----BEGIN CERTIFICATE")[0])
    bare = folder.path / "agent.crt"
    bare.write_text("-----BEGIN CERTIFICATE" + mine.read_text().partition("-----BEGIN CERTIFICATE")[2])
    telemetryd(
        "stats",
        *daemon,
        cwd=folder.path,
        TELEMETRY_API_CLIENT_CERT=str(bare),
        TELEMETRY_API_CLIENT_KEY=str(key),
    )
    telemetryd("stats", *daemon, "--client-cert", bare, "--client-key", key, cwd=folder.path)
    telemetryd("stats", cwd=folder.path, TELEMETRY_DB_PATH=str(mutual.database))  # by the Unix socket
    wrong = telemetryd("stats", *daemon, "--client-cert", bare, cwd=folder.path, status=2).stderr
    assert f"--client-cert cannot be used: {bare} holds no certificate with its private key" in wrong
    assert "--client-key" in wrong
    none = folder.path / "none.pem"
    for flags, said in {
        ("--ca", none): f"--ca cannot be read: {none}: No such file or directory",
        ("--ca", key): f"--ca holds no certificate in PEM: {key}",
        ("--client-cert", none): f"--client-cert cannot be used: {none}: No such file or directory",
        (
            "--client-cert",
            bare,
            "--client-key",
            none,
        ): f"--client-cert cannot be used: {none}: No such file or directory",
        ("--client-cert", bare, "--client-key", bare): f"--client-cert cannot be used: {bare} holds no private key",
        ("--client-key", key): "client_cert must be set when --client-key (TELEMETRY_API_CLIENT_KEY) is",
    }.items():
        wrong = telemetryd("stats", "--url", mutual.url, *flags, cwd=folder.path, status=2).stderr
        assert wrong.startswith(f"telemetryd: {said}"), wrong
        assert "Posix" not in wrong


def test_a_connection_without_an_answer_is_explained_by_its_address(folder: Folder, mutual: Daemon) -> None:
    plain = mutual.url.replace("https", "http")
    said = telemetryd("export", "-", "--url", plain, "--retry-for", "0", cwd=folder.path, status=1).stderr
    assert "it closed the connection without an answer; is https:// meant?" in said, said
    lost = http.client.RemoteDisconnected("no answer")
    assert why(lost, plain).endswith("is https:// meant?")
    for url in (mutual.url, "unix:///run/telemetryd.sock"):
        assert why(lost, url) == reach.reason(aiohttp.ServerDisconnectedError(), url) == disconnected(url)
        assert disconnected(url) == "it closed the connection without an answer"


def test_a_daemon_with_a_certificate_is_looked_for_by_https(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    assert local_url(folder.settings(), "127.0.0.1").startswith("http://127.0.0.1:")
    cert = folder.cert("found.pem")
    monkeypatch.setenv("TELEMETRY_TLS_CERT", str(cert))
    assert local_url(folder.settings(tls_cert=cert), "127.0.0.1").startswith("https://localhost:")
    assert Where().config().url == "https://localhost:8765"
    monkeypatch.setenv("TELEMETRY_API_PORT", "8766")
    assert Where().config().url == Config.load().url == "https://localhost:8766"


def test_wrong_certificates_of_a_client_are_named(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    good, other = folder.cert("agent.pem", "a@example.org"), folder.cert("b.pem", "b@example.org")
    monkeypatch.setenv("TELEMETRY_API_CLIENT_CERT", str(good))
    monkeypatch.setenv("TELEMETRY_API_CLIENT_KEY", str(other))
    with pytest.raises(
        ValueError, match=f"TELEMETRY_API_CLIENT_CERT: cannot be used: the private key in {other} does not"
    ):
        Config.load()
    config, faults = Config.tolerant()
    assert (config.send, config.client_cert, config.client_key, len(faults)) == (False, None, None, 1)
    assert Config.load(client_cert=good).client_key is None  # the key in the environment is that of another one
    monkeypatch.delenv("TELEMETRY_API_CLIENT_CERT")
    with pytest.raises(ValueError, match="TELEMETRY_API_CLIENT_CERT: must be set when --client-key"):
        Config.load()


# --- Renewal -------------------------------------------------------------------------------------


def run(new_loop: Callable[[], asyncio.AbstractEventLoop], main: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(main)


def port_of(daemon: Running) -> int:
    address = daemon.addresses[0]
    assert address.startswith("https://127.0.0.1:")
    return int(address.rpartition(":")[2])


@both_loops
def test_a_renewal_reaches_new_connections_and_breaks_no_old_one(
    folder: Folder, tmp_path: Path, new_loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    first = folder.settings(tls_cert=folder.cert("first.pem"))
    second = folder.settings(tls_cert=folder.cert("second.pem"))
    context = client_context(folder.ca)
    wrong = folder.settings(tls_cert=tmp_path / "none")

    async def main() -> None:
        async with running(first.model_copy(update={"db_path": tmp_path / "telemetry.sqlite"})) as daemon:
            port, is_over = port_of(daemon), asyncio.Event()
            answered = [0] * 8

            async def keep_asking(number: int) -> bytes:
                reader, writer = await asyncio.open_connection(
                    "127.0.0.1", port, ssl=context, server_hostname="localhost"
                )
                with contextlib.closing(writer):
                    while not is_over.is_set():
                        await post(reader, writer, make_run())
                        answered[number] += 1
                    return bytes(writer.get_extra_info("ssl_object").getpeercert(True))

            async def all_have_gone_on() -> None:
                before = list(answered)
                await eventually(lambda: all(now > then for now, then in zip(answered, before, strict=True)))

            tasks = [asyncio.create_task(keep_asking(number)) for number in range(4)]
            await eventually(lambda: all(answered[:4]))
            tls = next(part.reloadable for part in daemon.parts if part.name == "certificate")
            with pytest.raises(ConfigurationError, match="cannot be read"):
                tls.prepare(wrong)
            put_into_use = tls.prepare(second)
            assert put_into_use is not None
            tasks += [asyncio.create_task(keep_asking(number)) for number in range(4, 6)]
            await eventually(lambda: all(answered[:6]))
            put_into_use()
            tasks += [asyncio.create_task(keep_asking(number)) for number in range(6, 8)]
            await eventually(lambda: all(answered))
            await all_have_gone_on()
            is_over.set()
            begun, unfinished = await asyncio.open_connection("127.0.0.1", port)
            unfinished.write(b"\x16\x03")
            shown = [*map(bytes, await asyncio.gather(*tasks))]
            old, new = (ssl.PEM_cert_to_DER_cert(chain_of(settings)) for settings in (first, second))
            assert shown == [old] * 6 + [new] * 2
        assert await begun.read() == b""  # an unfinished handshake does not outlive the daemon
        unfinished.close()

    run(new_loop, main())


def test_a_reload_of_the_daemon_renews_its_certificate_or_says_why_not(
    folder: Folder, start_daemon: StartDaemon
) -> None:
    file = folder.cert("reloaded.pem")
    daemon = start_daemon(TELEMETRY_TLS_CERT=str(file))
    port, context = int(daemon.url.rpartition(":")[2]), client_context(folder.ca)

    def shown() -> bytes | None:
        with connected(port, context) as sock:
            return sock.getpeercert(binary_form=True)

    with connected(port, context) as resting:
        first = shown()
        folder.cert("reloaded.pem")
        daemon.process.send_signal(signal.SIGHUP)
        assert daemon.wait_for_line("Reloaded")["changed"] == ["certificate"]
        second = shown()
        assert second != first
        file.write_text("nothing")
        assert "holds no certificate in PEM" in telemetryd("config", "--check", "--tls-cert", file, status=2).stderr
        daemon.process.send_signal(signal.SIGHUP)
        (problem,) = daemon.wait_for_line("Not reloaded, all stays as it was")["problems"]
        assert problem == f"TELEMETRY_TLS_CERT: {file}: holds no certificate in PEM"
        assert shown() == second
        assert ask(resting).startswith(b"HTTP/1.1 200 ")


def chain_of(settings: Settings) -> str:
    """Return the first certificate of a daemon's file."""
    assert settings.tls_cert is not None
    begin = "-----BEGIN CERTIFICATE"
    return begin + settings.tls_cert.read_text().split(begin)[1]


async def post(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: object) -> bytes:
    text = orjson.dumps(body)
    head = b"POST /api/v1/runs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    writer.write(head + b"Content-Length: %d\r\n\r\n" % len(text) + text)
    answer = await reader.readuntil(b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 201 "), answer
    length = next(line for line in answer.lower().splitlines() if line.startswith(b"content-length:"))
    return await reader.readexactly(int(length.split(b":")[1]))


@both_loops
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_an_authority_that_counts_no_more_lets_nobody_in_by_an_old_session(
    folder: Folder, new_loop: Callable[[], asyncio.AbstractEventLoop], version: ssl.TLSVersion
) -> None:
    cert = folder.cert("daemon-2.pem")
    before = folder.settings(tls_cert=cert, tls_client_ca=folder.ca)
    tls = Tls(before)
    context = client_context(folder.ca, folder.cert("agent.pem", "agent@example.org"), version)

    def visit(port: int, session: ssl.SSLSession | None = None) -> tuple[ssl.SSLSession | None, bool | None]:
        with connected(port, context, session=session) as sock:
            sock.sendall(b"x")
            assert sock.recv(1) == b"x"
            return sock.session, sock.session_reused

    async def main() -> None:
        failed: list[str] = []
        handshakes = Handshakes(tls, Echo, lambda: False, failed.append, patience_s=20, most_bytes=1 << 30)
        async with await asyncio.get_running_loop().create_server(handshakes, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            session, _ = await asyncio.to_thread(visit, port)
            session, is_resumed = await asyncio.to_thread(visit, port, session)
            assert is_resumed  # so far it is worth something
            renew(tls, folder.settings(tls_cert=cert, tls_client_ca=folder.other_ca))
            with pytest.raises(ssl.SSLError, match="ALERT_UNKNOWN_CA"):
                await asyncio.to_thread(visit, port, session)
            assert failed == ["client_certificate"]
            renew(tls, before)
            await asyncio.to_thread(visit, port)

    run(new_loop, main())


class Echo(asyncio.Protocol):
    """Sends back what it gets; what it gets while it is paused is an error."""

    transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        assert self.transport.is_reading()
        if isinstance(self.transport, SecureConnection):
            assert self.transport._incoming.pending < 32 * 1024  # what comes faster waits elsewhere
        self.transport.write(data)
        self.transport.pause_reading()
        asyncio.get_running_loop().call_soon(self.transport.resume_reading)


# --- Bounds --------------------------------------------------------------------------------------


@both_loops
def test_much_arrives_whole_however_often_reading_pauses(
    folder: Folder, new_loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    context, data = client_context(folder.ca), os.urandom(3_000_000)

    async def main() -> None:
        tls = Tls(folder.settings(tls_cert=folder.cert("echo.pem")))
        handshakes = Handshakes(tls, Echo, lambda: False, lambda _: None, patience_s=20, most_bytes=1 << 30)
        async with await asyncio.get_running_loop().create_server(handshakes, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname="localhost")
            writer.write(data)
            assert await asyncio.wait_for(reader.readexactly(len(data)), 60) == data
            writer.close()
            assert await reader.read() == b""
            await writer.wait_closed()

    run(new_loop, main())


def test_failed_handshakes_are_one_line_a_minute(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    tls, now, counted = Tls(folder.settings(tls_cert=folder.cert("logged.pem"))), [5.0], Counter[str]()
    handshakes = Handshakes(
        tls,
        Echo,
        lambda: False,
        lambda reason: counted.update([reason]),
        patience_s=1,
        most_bytes=1,
        clock=lambda: now[0],
    )
    for moment, reason in ((5, "version"), (64, "version"), (64, "timeout"), (65, "version"), (124, "other")):
        now[0] = moment
        handshakes.count(reason, "127.0.0.1")
    lines = [vars(record)["reasons"] for record in caplog.records if record.message == "TLS handshakes failed"]
    assert lines == [{"version": 1}, {"version": 2, "timeout": 1}]
    assert counted == {"version": 3, "timeout": 1, "other": 1}


@both_loops
def test_handshakes_are_bounded_in_time_and_number_and_keep_nobody_out(
    folder: Folder, new_loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    context = client_context(folder.ca)
    settings = folder.settings(tls_cert=folder.cert("bounded.pem"))

    async def answer(_: web.Request) -> web.Response:
        return web.Response(text="here")

    async def main() -> None:
        failed: Counter[str] = Counter()
        app = web.Application()
        app.router.add_get("/", answer)
        runner = connections.make_runner(app, settings, 0, ConnectionBounds(handshake_s=1.0))
        cast(Any, runner).most_connections = 10
        await runner.setup()
        with socket.create_server(("127.0.0.1", 0)) as listening, socket.socket(socket.AF_UNIX) as unix:
            unix.bind(str(folder.path / f"{new_loop.__module__}.sock"))
            await connections.listen(runner, [listening, unix], Tls(settings), lambda reason: failed.update((reason,)))
            port = listening.getsockname()[1]
            silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(25)]
            await eventually(lambda: failed["crowded"] == 15)
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as session:
                for _ in range(3):
                    async with session.get(f"https://localhost:{port}/", headers={"Connection": "close"}) as got:
                        assert await got.text() == "here"
            connector = aiohttp.UnixConnector(str(unix.getsockname()))  # speaks plain HTTP, and has room as well
            async with aiohttp.ClientSession(connector=connector) as session, session.get("http://x/") as got:
                assert await got.text() == "here"
            await eventually(lambda: failed.total() == 25)  # those that were not cut so far are after a second
            assert failed["timeout"] > 0
            for _, writer in silent:
                writer.close()
            await runner.cleanup()

    run(new_loop, main())


class Slow(Echo):
    """Needs its time for what it gets, and never pauses."""

    def data_received(self, data: bytes) -> None:
        time.sleep(0.02)
        self.transport.write(data)


@both_loops
def test_much_that_comes_at_once_leaves_the_others_their_turns(
    folder: Folder, new_loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    context = client_context(folder.ca)

    async def main() -> None:
        tls = Tls(folder.settings(tls_cert=folder.cert("slow.pem")))
        handshakes = Handshakes(tls, Slow, lambda: False, lambda _: None, patience_s=20, most_bytes=1 << 30)
        async with await asyncio.get_running_loop().create_server(handshakes, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname="localhost")
            for _ in range(50):
                writer.write(b"x")  # a record
            answer = asyncio.create_task(reader.readexactly(50))
            longest, before = 0.0, time.monotonic()
            while not answer.done():
                await asyncio.sleep(0)
                longest, before = max(longest, time.monotonic() - before), time.monotonic()
            writer.close()
            assert await answer == b"x" * 50
            assert longest < 0.5, "all of it takes a second"

    run(new_loop, main())


@pytest.mark.parametrize("letter", ["k", "K"])
def test_new_keys_again_and_again_end_the_connection(folder: Folder, mutual: Daemon, letter: str) -> None:
    """Each of them costs more than a request; `K` asks for new keys of the daemon as well."""
    require_program("openssl", "openssl")
    cert = folder.cert("keys.pem", "agent@example.org")
    where = "127.0.0.1:" + mutual.url.rpartition(":")[2]
    command = ["openssl", "s_client", "-connect", where, "-tls1_3", "-cert", str(cert)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, bufsize=0) as client:
        assert client.stdin is not None
        began = time.monotonic()
        with contextlib.suppress(BrokenPipeError):
            while client.poll() is None and time.monotonic() - began < 8:
                client.stdin.write(f"{letter}\n".encode())  # it takes one a read
                time.sleep(0.005)
        is_cut = time.monotonic() - began < 8
        client.kill()
    assert is_cut
    assert words(folder.config(mutual.url, client_cert=cert)) == "200"


def half_a_hello(size: int) -> bytes:
    """Return the beginning of a handshake that says to be long."""
    begun = b"\x01\x01\xff\x00\x03\x03" + bytes(size)
    records = [begun[at : at + 16_000] for at in range(0, len(begun), 16_000)]
    return b"".join(b"\x16\x03\x01" + len(each).to_bytes(2, "big") + each for each in records)


@both_loops
def test_what_handshakes_hold_is_bounded_and_those_with_most_go_first(
    folder: Folder, new_loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    context = client_context(folder.ca)

    async def main() -> None:
        failed: Counter[str] = Counter()
        tls = Tls(folder.settings(tls_cert=folder.cert("held.pem")))
        handshakes = Handshakes(
            tls, Echo, lambda: False, lambda reason: failed.update((reason,)), patience_s=20, most_bytes=1 << 20
        )
        async with (
            asyncio.timeout(60),
            await asyncio.get_running_loop().create_server(handshakes, "127.0.0.1", 0) as server,
        ):
            port = server.sockets[0].getsockname()[1]
            small = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
            large = []
            try:
                for _, writer in small:
                    writer.write(half_a_hello(100))
                for _ in range(40):
                    large.append(await asyncio.open_connection("127.0.0.1", port))
                    large[-1][1].write(half_a_hello(100_000))
                    reader, other = await asyncio.open_connection(
                        "127.0.0.1", port, ssl=context, server_hostname="localhost"
                    )
                    other.write(b"x")
                    assert await reader.readexactly(1) == b"x"
                    other.close()
                await eventually(lambda: failed["crowded"] >= 30)
                assert not any(reader.at_eof() for reader, _ in small)
            finally:
                for _, writer in small + large:
                    writer.close()
            await eventually(lambda: len(handshakes) == 0)
            assert handshakes._held.bytes == 0

    run(new_loop, main())


class Socket(asyncio.Transport):
    """What a connection of TLS is given for its socket."""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Let it go."""

    def is_closing(self) -> bool:
        return False


def test_a_record_that_has_only_begun_keeps_nothing_of_what_came_before_it(folder: Folder) -> None:
    async def main() -> None:
        tls = Tls(folder.settings(tls_cert=folder.cert("begun.pem")))
        handshakes = Handshakes(tls, Echo, lambda: False, lambda _: None, patience_s=20, most_bytes=1 << 30)
        connection = cast(SecureConnection, handshakes())
        connection.connection_made(Socket())
        connection.data_received(half_a_hello(100_000) + b"\x16\x03")
        assert bytes(connection._waiting) == b"\x16\x03"
        assert len(cast(bytes, connection._waiting.obj)) == 2
        connection.connection_lost(None)

    asyncio.run(main())
