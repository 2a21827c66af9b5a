"""DMD2 and SiD reach the mixture: no mode is lost and each keeps its weight."""

import pytest
from broken_methods import broken_copies, refute
from exact_report import PROOFS, hold

pytestmark = [pytest.mark.slow, pytest.mark.proof]
CASES = [(method, mixture) for method in ("dmd2", "sid") for mixture in PROOFS[method].mixtures[:1]]


@pytest.mark.parametrize(("method", "mixture"), CASES)
def test_the_student_is_proved(method: str, mixture: str) -> None:
    hold(method, mixture)


@pytest.mark.parametrize("name", broken_copies("dmd2"))
def test_a_broken_copy_does_not_pass(name: str) -> None:
    refute(name)
