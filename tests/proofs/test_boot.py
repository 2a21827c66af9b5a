"""BOOT reaches the exact flow map, and keeps the exact spread along the trajectory."""

import pytest
from broken_methods import broken_copies, refute
from exact_report import PROOFS, hold

pytestmark = [pytest.mark.slow, pytest.mark.proof]


@pytest.mark.parametrize("mixture", PROOFS["boot"].mixtures[:1])
def test_the_student_is_proved(mixture: str) -> None:
    hold("boot", mixture)


@pytest.mark.parametrize("name", broken_copies("boot"))
def test_a_broken_copy_does_not_pass(name: str) -> None:
    refute(name)
