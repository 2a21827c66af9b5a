"""Continuous-time consistency (sCM) reaches the exact flow map, with a slow and with a fast clock."""

import pytest
from broken_methods import broken_copies, refute
from exact_report import PROOFS, hold

pytestmark = [pytest.mark.slow, pytest.mark.proof]
CASES = [(method, mixture) for method in ("scm", "scm_fast_clock") for mixture in PROOFS[method].mixtures[:1]]


@pytest.mark.parametrize(("method", "mixture"), CASES)
def test_the_student_is_proved(method: str, mixture: str) -> None:
    hold(method, mixture)


@pytest.mark.parametrize("name", broken_copies("scm_fast_clock"))
def test_a_broken_copy_does_not_pass(name: str) -> None:
    refute(name)
