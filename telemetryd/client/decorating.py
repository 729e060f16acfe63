"""Decorates functions with runs: functions, coroutines, generators, and callables that return an awaitable."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from types import AsyncGeneratorType, GeneratorType
from typing import Any, Final, ParamSpec, Protocol, TypeVar, cast

P = ParamSpec("P")
R = TypeVar("R")

CO_COROUTINE: Final = 0x80
_CO_GENERATOR: Final = 0x20
_CO_ASYNC_GENERATOR: Final = 0x200
"""Flags as in the module inspect, which takes long to import."""


class Decorating(Protocol):
    """What is asked of a run here."""

    def __enter__(self) -> object:
        """Record that the run has begun; runs that begin now are its children."""

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Record that it has ended, well or with an exception."""

    def step_out(self) -> None:
        """Go on without being the parent of what begins here."""


def decorated(function: Callable[P, R], make_run: Callable[[], Decorating]) -> Callable[P, R]:
    """Return a function each call of which is a run.

    Raises:
        TypeError: if it is no function, or its call ends before its work begins.

    """
    if isinstance(function, (staticmethod, classmethod)):
        return cast("Callable[P, R]", type(function)(decorated(function.__func__, make_run)))
    _refuse_unless_it_works_when_called(function)
    if _flags(function) & CO_COROUTINE:

        @functools.wraps(function)
        async def awaited(*args: Any, **kwargs: Any) -> Any:
            with make_run():
                return await function(*args, **kwargs)  # type: ignore[misc]

        return cast("Callable[P, R]", awaited)

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        run = make_run()
        run.__enter__()
        try:
            result = function(*args, **kwargs)
        except BaseException as error:
            run.__exit__(type(error), error, error.__traceback__)
            raise
        return cast("R", _lasting(result, run))

    return called


def _lasting(result: object, run: Decorating) -> object:
    """Return what a call returned, so that the run ends when the work ends that this stands for."""
    is_awaited = hasattr(type(result), "__await__")
    is_future = hasattr(type(result), "add_done_callback")  # those of concurrent.futures cannot be awaited
    if not is_awaited and not is_future and not isinstance(result, (GeneratorType, AsyncGeneratorType)):
        run.__exit__(None, None, None)
        return result
    run.step_out()
    if callable(when_done := getattr(result, "add_done_callback", None)):
        when_done(functools.partial(_end, run))  # a task or a future, which goes on by itself
        return result
    if isinstance(result, GeneratorType):
        return _iterating(result, run)
    if isinstance(result, AsyncGeneratorType):
        return _iterating_async(result, run)
    return _awaiting(cast("Awaitable[object]", result), run)


async def _awaiting(result: Awaitable[object], run: Decorating) -> object:
    with run:
        return await result


def _iterating(result: Generator[Any, Any, Any], run: Decorating) -> Generator[Any, Any, Any]:
    with run:
        return (yield from result)


async def _iterating_async(result: AsyncGenerator[Any, Any], run: Decorating) -> AsyncGenerator[Any, Any]:
    with run:
        async with contextlib.aclosing(result):
            async for item in result:
                yield item


def _end(run: Decorating, future: Any) -> None:
    """End a run with what became of a future."""
    try:
        error = future.exception()
    except BaseException as cancelled:  # noqa: BLE001 - of asyncio or of another library; it says how the run ended
        error = cancelled
    run.__exit__(type(error), error, None)


def _refuse_unless_it_works_when_called(function: Any) -> None:
    name = getattr(function, "__qualname__", function)
    if not callable(function):
        raise TypeError(f"{name!r} cannot be decorated with a run: it is no function")
    code = getattr(function, "__code__", None)
    if code is not None and code.co_filename == contextlib.contextmanager.__code__.co_filename:
        raise TypeError(f"{name} is a context manager: use `with client.run(…):` within it instead of decorating it")
    if _flags(function) & (_CO_GENERATOR | _CO_ASYNC_GENERATOR):
        raise TypeError(f"{name} is a generator: use `with client.run(…):` within it instead of decorating it")


def _flags(function: Any) -> int:
    """Return the flags of the code that runs when it is called, also if it is a partial, a method or an object."""
    while isinstance(function, (functools.partial, functools.partialmethod)):
        function = function.func
    code = getattr(function, "__code__", None)
    if code is None and not isinstance(function, type):
        code = getattr(getattr(type(function), "__call__", None), "__code__", None)  # noqa: B004 - its code is asked for
    return int(code.co_flags) if code is not None else 0
