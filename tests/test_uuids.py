from __future__ import annotations

import itertools
import os
import random
import threading
import uuid

from hypothesis import given
from hypothesis import strategies as st

from telemetryd.uuids import TimeOrderedUuids, new_uuid

_NS_PER_MS = 1_000_000


def milliseconds(text: str) -> int:
    return uuid.UUID(text).int >> 80


@given(st.lists(st.integers(0, (1 << 48) * _NS_PER_MS - _NS_PER_MS), min_size=1, max_size=50))
def test_each_is_greater_whatever_the_clock_does(moments: list[int]) -> None:
    clock = iter(moments)
    make = TimeOrderedUuids(lambda: next(clock))
    made = [make() for _ in moments]
    assert all(one < two for one, two in itertools.pairwise(made))
    latest = 0
    for text, moment in zip(made, moments, strict=True):
        parsed = uuid.UUID(text)
        assert (str(parsed), parsed.version, parsed.variant) == (text, 7, uuid.RFC_4122)
        latest = max(latest, moment)
        assert milliseconds(text) - latest // _NS_PER_MS in (0, 1)  # 1 if the ticks of the millisecond are used up


def test_it_begins_with_the_time() -> None:
    moment = 0x017F22E279B0 * _NS_PER_MS + _NS_PER_MS // 2
    text = TimeOrderedUuids(lambda: moment)()
    assert text.startswith("017f22e2-79b0-7800-")  # the example of RFC 9562, appendix A.6, half a millisecond later


def test_a_forked_process_makes_others_which_are_greater_as_well() -> None:
    before = new_uuid()
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(into, ",".join(new_uuid() for _ in range(10)).encode())
        os._exit(0)
    os.waitpid(child, 0)
    theirs = os.read(out, 4096).decode().split(",")
    os.close(out)
    os.close(into)
    assert [before, *theirs] == sorted({before, *theirs})
    # The parent and the child go on from the same moment, so only the random digits differ.
    make = TimeOrderedUuids(lambda: 0)
    make()
    copy = TimeOrderedUuids(lambda: 0)
    copy()
    assert {make()[19:] for _ in range(10)}.isdisjoint(copy()[19:] for _ in range(10))


def test_a_fork_while_another_thread_makes_one_does_not_wait_for_it() -> None:
    entered, release = threading.Event(), threading.Event()

    def clock() -> int:
        if threading.current_thread() is not threading.main_thread():
            entered.set()
            release.wait()
        return 0

    make = TimeOrderedUuids(clock)
    thread = threading.Thread(target=make)
    thread.start()
    entered.wait()
    make.forked()
    assert uuid.UUID(make()).version == 7
    release.set()
    thread.join()


def test_seeding_the_shared_generator_does_not_repeat_them() -> None:
    random.seed(1)
    first = new_uuid()
    random.seed(1)
    assert new_uuid()[19:] != first[19:]


def test_threads_make_different_ones_each_in_order() -> None:
    made: list[list[str]] = []

    def make_some() -> None:
        made.append([new_uuid() for _ in range(2_000)])

    threads = [threading.Thread(target=make_some) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({text for some in made for text in some}) == 8_000
    assert all(some == sorted(some) for some in made)
