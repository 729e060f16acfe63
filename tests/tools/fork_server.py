"""Lets programs of a shell script start `telemetryd …` as a fork, as tests do: most of a start is imports."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from tests.tools.forks import parent

# It imports little, as it is started for each command. What it is sent, it passes on to the command.
_PROGRAM: Final = """#!{python} -IS
import json, os, signal, socket, sys
request = {{"arguments": sys.argv[1:], "env": dict(os.environ), "cwd": os.getcwd()}}
channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
channel.connect({address!r})
socket.send_fds(channel, [json.dumps(request).encode()], [0, 1, 2])
pid = int(channel.recv(100))
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, lambda number, frame: os.kill(pid, number))
status = int(channel.recv(100))
sys.exit(128 - status if status < 0 else status)
"""


class ForkServer:
    """Forks for the program that it writes.

    Args:
        program: where that is written, as an executable file.
        address: of its socket.

    """

    def __init__(self, program: Path, address: Path) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(address))
        self._listener.listen()
        program.write_text(_PROGRAM.format(python=sys.executable, address=str(address)))
        program.chmod(0o755)
        self._threads = [threading.Thread(target=self._accept)]

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the listener was shut down
            while True:
                channel, _ = self._listener.accept()
                thread = threading.Thread(target=self._serve, args=(channel,))
                self._threads.append(thread)
                thread.start()

    @staticmethod
    def _serve(channel: socket.socket) -> None:
        with channel, contextlib.suppress(BrokenPipeError):
            text, files, _, _ = socket.recv_fds(channel, 1 << 20, 3)
            request: dict[str, Any] = json.loads(text)
            pid = parent().fork(request["arguments"], request["env"], request["cwd"], files)
            for number in files:
                os.close(number)
            channel.send(str(pid).encode())
            _, status = os.waitpid(pid, 0)
            channel.send(str(os.waitstatus_to_exitcode(status)).encode())
