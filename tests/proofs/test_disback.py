"""DisBack reaches the mixture: no mode is lost and each keeps its weight."""

import pytest
from exact_report import PROOFS, hold

pytestmark = [pytest.mark.slow, pytest.mark.proof]


@pytest.mark.parametrize("mixture", PROOFS["disback"].mixtures[:1])
def test_the_student_is_proved(mixture: str) -> None:
    hold("disback", mixture)
