"""Starts `python -m telemetryd …` as a fork of a process that has imported everything: most of a start is imports."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import pkgutil
import re
import runpy
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

_COMMAND: Final = [sys.executable, "-m", "telemetryd"]
_PR_SET_CHILD_SUBREAPER: Final = 36
_FRESH: Final = re.compile("PYTHON|LD_|LC_|LANG|MALLOC|GLIBC|UV_")
"""Variables that an interpreter reads when it starts; another value needs an interpreter of its own."""
_PRELOAD: Final = "LD_PRELOAD"
"""The one of them for whose every value there is a process that forks."""


def popen(command: Sequence[str], env: Mapping[str, str], **options: Any) -> subprocess.Popen[str]:
    """Start a program in text mode: as a fork if it is `python -m telemetryd` and needs no interpreter of its own."""
    arguments = [str(argument) for argument in command]
    fresh = {name for name in {**env, **os.environ} if _FRESH.match(name) and env.get(name) != os.environ.get(name)}
    fresh.discard(_PRELOAD)
    if sys.platform != "linux" or arguments[:3] != _COMMAND or fresh or options.keys() - {"cwd", "stdout", "stderr"}:
        return subprocess.Popen(arguments, env=env, text=True, **options)
    return _Fork(arguments, env=env, text=True, **options)


class _Fork(subprocess.Popen[str]):
    """A child of this process like any other; only how it is made differs."""

    # The one method of Popen that makes the process; what follows the arguments is the same from Python 3.11 on.
    def _execute_child(self, args: list[str], *options: Any) -> None:
        cwd, env, pipes = options[4], options[5], options[9:15]
        files = [number if number != -1 else place for place, number in enumerate((pipes[0], pipes[3], pipes[5]))]
        self._child_created = True
        try:
            self.pid = parent(env.get(_PRELOAD, "")).fork(args[3:], env, str(cwd or Path.cwd()), files)
        finally:
            self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]


class Parent:
    """The process that has imported everything; it forks, and hands its children over to this process."""

    def __init__(self, preload: str) -> None:
        self.owner = os.getpid()
        self._socket, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._lock = threading.Lock()
        self._prctl = ctypes.CDLL(None, use_errno=True).prctl
        with other:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.tools.forks", str(other.fileno())],
                cwd=Path(__file__).parents[2],
                env={**os.environ, **({_PRELOAD: preload} if preload else {})},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(other.fileno(),),
            )
        atexit.register(self._end)

    def _end(self) -> None:
        if self.owner == os.getpid():
            self._socket.close()
            self._process.wait()

    def fork(self, arguments: list[str], env: Mapping[str, str], cwd: str, files: list[int]) -> int:
        """Let it fork; return the PID of the fork, which is a child of this process."""
        status = Path("/proc/self/status").read_text()
        umask = int(next(line for line in status.splitlines() if line.startswith("Umask:")).split()[1], 8)
        request = json.dumps({"arguments": arguments, "env": dict(env), "cwd": cwd, "umask": umask})
        with self._lock:
            # A process that loses its parent becomes a child of this process instead of the first one's (prctl(2)).
            self._prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            try:
                socket.send_fds(self._socket, [request.encode()], files)
                pid = int(self._socket.recv(100))
            finally:
                self._prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
        return pid


_parents: Final[dict[tuple[int, str], Parent]] = {}
"""One for each process that runs tests and each library that its children load first."""


def parent(preload: str = "") -> Parent:
    """Return the process that forks for this one."""
    key = os.getpid(), preload
    if key not in _parents:
        _parents[key] = Parent(preload)
    return _parents[key]


def _serve(channel: socket.socket) -> None:
    """Fork for each request; return in the fork, and end with the process that asks."""
    while True:
        request, files, _, _ = socket.recv_fds(channel, 1 << 20, 3)
        if not request:
            sys.exit()
        told, tell = os.pipe()
        if not (middle := os.fork()):
            if pid := os.fork():
                os.write(tell, str(pid).encode())
                os._exit(0)
            os.close(told)
            os.close(tell)
            _become(json.loads(request), files)
            return
        os.waitpid(middle, 0)  # its child has a new parent now
        os.close(tell)
        channel.send(os.read(told, 100))
        for number in (told, *files):
            os.close(number)


def _become(request: dict[str, Any], files: list[int]) -> None:
    for place, number in enumerate(files):
        os.dup2(number, place)
        os.close(number)
    # The old ones know what kind of files they were.
    sys.stdin, sys.stdout, sys.stderr = (
        open(place, mode, buffering, encoding=old.encoding, errors=old.errors, closefd=False)  # noqa: SIM115 - for its life
        for place, (mode, buffering, old) in enumerate(
            (("r", -1, sys.stdin), ("w", -1, sys.stdout), ("w", 1, sys.stderr))
        )
    )
    os.environ.clear()
    os.environ.update(request["env"])
    time.tzset()
    os.umask(request["umask"])
    os.chdir(request["cwd"])
    sys.argv[1:] = request["arguments"]


def _main() -> None:
    import telemetryd

    for module in pkgutil.walk_packages(telemetryd.__path__, "telemetryd."):
        if not module.name.endswith("__main__"):
            with contextlib.suppress(ImportError):  # what is optional
                importlib.import_module(module.name)
    gc.freeze()  # or each collection would copy the pages that the forks share
    channel = socket.socket(fileno=int(sys.argv[1]))
    _serve(channel)
    channel.close()
    try:
        runpy.run_module("telemetryd", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            _end_quickly(end.code or 0)
        raise


def _end_quickly(status: int) -> None:
    """End as the interpreter does, except that it frees nothing: that takes most of a short command's time.

    Freeing writes to each page that a fork shares with its parent. Return if a stream cannot be flushed, so that the
    interpreter reports that as it always does.
    """
    threading._shutdown()  # type: ignore[attr-defined] # waits for threads, as Py_FinalizeEx() does first
    atexit._run_exitfuncs()
    gc.collect()  # what is left behind, such as a pending task, complains now
    with contextlib.suppress(OSError, ValueError):
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)


if __name__ == "__main__":
    _main()
