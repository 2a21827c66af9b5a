"""Hyper-SD's students reach the exact flow map at the end of every stage."""

import pytest
from broken_methods import broken_copies, refute
from exact_report import PROOFS, hold

pytestmark = [pytest.mark.slow, pytest.mark.proof]


@pytest.mark.parametrize("mixture", PROOFS["hyper_sd"].mixtures[:1])
def test_the_student_is_proved(mixture: str) -> None:
    hold("hyper_sd", mixture)


@pytest.mark.parametrize("name", broken_copies("hyper_sd"))
def test_a_broken_copy_does_not_pass(name: str) -> None:
    refute(name)
