"""Every input that the fuzzer found worth keeping is read without an error that is no answer."""

from __future__ import annotations

import pytest

from tests.fuzz.targets import CORPUS, TARGETS


@pytest.mark.parametrize("name", TARGETS)
def test_the_corpus(name: str) -> None:
    inputs = sorted((CORPUS / name).iterdir())
    assert len(inputs) > 20
    for path in inputs:
        try:
            TARGETS[name](path.read_bytes())
        except Exception as error:
            error.add_note(f"input {path.name}")
            raise
