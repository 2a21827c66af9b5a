"""Proofs over what recipes run: the schedule of stock teachers, forty points, a head of x0."""

import pytest
from exact_report import VPS, hold

pytestmark = [pytest.mark.slow, pytest.mark.proof]


@pytest.mark.parametrize("mixture", VPS)
@pytest.mark.parametrize("method", ["consistency_x0", "boot_vp"])
def test_the_student_is_proved_under_the_schedule_of_stock_teachers(method: str, mixture: str) -> None:
    hold(method, mixture)
