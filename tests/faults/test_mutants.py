"""A product that breaks a promise on purpose is noticed by the tests; else they would prove nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.ledger import ROOT
from tests.faults.mutants import MUTANTS, Mutant, copy_product, run

each_mutant = pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)


def test_every_mutant_still_fits_the_code() -> None:
    for mutant in MUTANTS:
        assert mutant.files(), mutant.name
        for test in mutant.tests:
            file, _, name = test.partition("::")
            assert f"def {name.partition('[')[0]}" in (ROOT / file).read_text("utf-8"), test


@pytest.mark.slow
def test_the_tests_of_the_mutants_pass_without_a_mutant(tmp_path: Path) -> None:
    copy_product(tmp_path)
    status, output = run(tmp_path, sorted({test for mutant in MUTANTS for test in mutant.tests}), timeout_s=1800)
    assert status == 0, output


@pytest.mark.slow
@each_mutant
def test_a_mutant_is_noticed(tmp_path: Path, mutant: Mutant) -> None:
    copy_product(tmp_path)
    for file, text in mutant.files().items():
        (tmp_path / file).write_text(text, "utf-8")
    status, output = run(tmp_path, mutant.tests)
    assert status != 0, f"nobody has noticed: {mutant.name}"
    assert status == 1, output  # not because the tests could not be run
