"""Fuzzes a target with atheris: python -m tests.fuzz body -max_total_time=600 (needs the extra "fuzz")."""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["telemetryd", "urllib.parse"]):
    from tests.fuzz.targets import CORPUS, TARGETS


def main() -> None:
    """Run libFuzzer; what it finds new goes into the corpus, what crashes into crash-…."""
    name, *options = sys.argv[1:]
    atheris.Setup([sys.argv[0], *options, "-max_len=4096", str(CORPUS / name)], TARGETS[name])
    atheris.Fuzz()


main()
