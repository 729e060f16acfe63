"""Tables of references as git describes them (its document technical/reftable), with blocks and shared beginnings."""

from __future__ import annotations

from pathlib import Path

import pytest

from telemetryd.client.git import git_fields

A, B = "a" * 40, "b" * 40
# Written by another implementation (dulwich 1.2): HEAD refers to refs/heads/feature/x.
HEAD = bytes.fromhex(
    "5245465401001000000000000000000200000000000000037200003d0023484541440114726566732f68656164732f666561747572652f78"
    "00001c0001524546540100100000000000000000020000000000000003" + "00" * 40 + "f778a7fd"
)


def number(value: int) -> bytes:
    digits = [value & 0x7F]
    while value := value >> 7:
        value -= 1
        digits.append(0x80 | value & 0x7F)
    return bytes(reversed(digits))


def table(*blocks: dict[str, str | None], block_size: int = 4096, version: int = 1) -> bytes:
    """Return a table; a value is a hash, `ref: …`, or None for a reference that is deleted."""
    hash_name = b"s256" if version == 2 else b""
    data = b"REFT" + bytes([version]) + block_size.to_bytes(3, "big") + bytes(16) + hash_name
    for place, references in enumerate(blocks):
        start = len(data) if place else 0
        records, last = b"", b""
        for name, value in references.items():
            whole = name.encode()
            shared = 0
            while shared < min(len(whole), len(last)) and whole[shared] == last[shared]:
                shared += 1
            kind = 0 if value is None else 3 if value.startswith("ref: ") else 1
            target = (value or "").removeprefix("ref: ").encode()
            held = {0: b"", 1: bytes.fromhex(value or "") if kind == 1 else b"", 3: number(len(target)) + target}[kind]
            rest = whole[shared:]
            records += number(shared) + number(len(rest) << 3 | kind) + rest + number(1) + held
            last = whole
        body = records + (28).to_bytes(3, "big") + (1).to_bytes(2, "big")
        end = (0 if start else len(data)) + 4 + len(body)
        data += b"r" + end.to_bytes(3, "big") + body
        data += bytes((start + block_size if block_size else len(data)) - len(data))
    return data + b"REFT" + bytes(60)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    (tmp_path / ".git" / "reftable").mkdir(parents=True)
    (tmp_path / ".git" / "HEAD").write_text("ref: refs/heads/.invalid\n")
    return tmp_path


def fill(repository: Path, *tables: bytes) -> None:
    names = [f"{number}.ref" for number in range(len(tables))]
    for name, data in zip(names, tables, strict=True):
        (repository / ".git" / "reftable" / name).write_bytes(data)
    (repository / ".git" / "reftable" / "tables.list").write_text("".join(f"{name}\n" for name in names))


def told(repository: Path) -> tuple[str | None, str | None]:
    fields = git_fields(repository)
    return fields.get("git_branch"), fields.get("git_commit_hash")


@pytest.mark.parametrize("block_size", [0, 512])
def test_the_branch_and_its_commit_are_found_in_the_newest_table(repository: Path, block_size: int) -> None:
    many: dict[str, str | None] = {f"refs/heads/feature/{number:03}": A for number in range(5)}
    old = table({"refs/heads/feature/x": A}, block_size=block_size)
    new = table(many, {"refs/heads/feature/w" + "w" * 200: A, "refs/heads/feature/x": B}, block_size=block_size)
    fill(repository, HEAD, old, new)
    assert told(repository) == ("feature/x", B)
    fill(repository, HEAD, old, new, table({"refs/heads/feature/x": None}))
    assert told(repository) == ("feature/x", None)


def test_a_detached_head_and_long_hashes(repository: Path) -> None:
    fill(repository, table({"HEAD": A}))
    assert told(repository) == (None, A)
    fill(repository, table({"HEAD": "c" * 64}, version=2))
    assert told(repository) == (None, "c" * 64)


def test_what_is_damaged_or_missing_gives_nothing(repository: Path) -> None:
    assert told(repository) == (None, None)
    whole = table({"HEAD": A, "refs/heads/main": B})
    for length in range(len(whole) - 64):
        fill(repository, whole[:length])
        assert told(repository) in ((None, None), (None, A))
    fill(repository, b"no table at all")
    assert told(repository) == (None, None)
    (repository / ".git" / "reftable" / "tables.list").write_text("gone.ref\n")
    assert told(repository) == (None, None)
