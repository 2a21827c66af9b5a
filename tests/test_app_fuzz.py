"""Whatever comes in, a documented answer goes out: requests made from the OpenAPI document against a real process."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from service import LABELS, file_of, grey, publish, serving
from test_app_routes import MANY, rgb

from app.main import create_app
from app.settings import Settings

MODELS = [MANY, "plain", "sar", "absent"]
NEAR: dict[str, list[Any]] = {
    "model": MODELS,
    "n": [1, 2, 4],
    "steps": [1, 2, 3, 5],
    "label": [0, 1, 9],
    "prompt": [*LABELS, "", "a cat"],
    "size": ["auto", "16x16", "1x1"],
}
PICTURES = [rgb(), rgb(9, 16), file_of(grey(16, 16)), file_of(grey(16, 20), "TIFF"), rgb()[:60]]
PICTURES += [file_of(np.zeros((16, 16, 4), np.uint8)), file_of(np.zeros((300, 300), np.uint8)), b""]
picture = st.sampled_from(PICTURES) | st.binary(max_size=200)
schemathesis.openapi.format("binary", picture)
for kind in ("image/png", "image/tiff", "application/octet-stream"):
    schemathesis.openapi.media_type(kind, picture)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("weights")
    publish(root, MANY, "class-to-image", labels=LABELS, default_steps=2)
    publish(root, "plain", "image", teacher=MANY, step_times={1: [999.0]})
    publish(root, "sar", "sar-to-optical", teacher="not-here", step_times={1: [999.0]}, patch=2)
    small = {"FEWSTEP_MAX_STEPS": "4", "FEWSTEP_MAX_N": "3", "FEWSTEP_MAX_PIXELS": "60000", "FEWSTEP_JOB_TTL": "1"}
    with serving(root, **small) as port:
        yield f"http://127.0.0.1:{port}"


schema = schemathesis.openapi.from_dict(create_app(Settings(weights=Path("."))).openapi())


def bring_nearer(fields: dict[str, Any]) -> None:
    """What is made up freely is nearly always refused for the same reason; here is some that is not."""
    for name, some in NEAR.items():
        given = fields.get(name)
        if type(given) is type(some[0]):
            fields[name] = some[(given if isinstance(given, int) else len(given)) % len(some)]


@pytest.mark.process
@schema.parametrize()
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_answer_is_a_documented_one(case: Any, address: str) -> None:
    for part in (case.body, case.query):
        if isinstance(part, dict):
            bring_nearer(part)
    answer = case.call(base_url=address, timeout=300)
    assert answer.status_code != 500, answer.text
    case.validate_response(
        answer, checks=(status_code_conformance, content_type_conformance, response_schema_conformance)
    )
    if answer.status_code >= 400:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
