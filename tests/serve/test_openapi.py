"""What the OpenAPI document says of the endpoint is so; schemathesis asks by it."""

from __future__ import annotations

from collections import Counter
from copy import deepcopy

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.config import SchemathesisConfig
from schemathesis.specs.openapi.checks import positive_data_acceptance
from starlette.testclient import TestClient

from tests.serve.questions import FRAMES, ask_user
from tests.serve.test_endpoint import ANSWER, CHAT, Script, connect, question
from ultra.serve.endpoint import create_app
from ultra.serve.limits import ApiError, Limits
from ultra.serve.security import ApiKeys, digest_key

KEY = "key"
APP = create_app(Script(ANSWER), Limits(max_frames=3), ApiKeys([digest_key(KEY)]))
DOCUMENT = APP.openapi()
seen: Counter[tuple[str, int]] = Counter()


def load_schema() -> schemathesis.BaseSchema:
    """The document with a question that is answered, so that not every request is refused."""
    document = deepcopy(DOCUMENT)
    (media,) = document["paths"][CHAT]["post"]["requestBody"]["content"].values()
    body = {"model": "ultra", "messages": [ask_user("见囊肿？", FRAMES[0])]}
    media["examples"] = {"whole": {"value": body}, "stream": {"value": {**body, "stream": True}}}
    config = SchemathesisConfig.from_dict({"generation": {"deterministic": True}})
    schema = schemathesis.openapi.from_dict(document, config=config)
    schema.app = APP
    return schema


@load_schema().parametrize()
@settings(
    max_examples=60, derandomize=True, deadline=None, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
def test_answers_are_as_documented(case) -> None:
    # A question of any text and any image is well-formed, and refused all the same.
    response = case.call_and_validate(
        headers={"Authorization": f"Bearer {KEY}"}, excluded_checks=[positive_data_acceptance]
    )
    seen[case.path, response.status_code] += 1


def test_what_was_asked_was_answered_and_refused() -> None:
    """Depends on the test above: of requests that are all refused it would have shown nothing."""
    assert seen[CHAT, 200] >= 5
    assert seen[CHAT, 400] >= 20
    assert seen[CHAT, 404] >= 1
    for path in ("/health/ready", "/metrics", "/v1/models"):
        assert seen[path, 200]


@pytest.mark.parametrize("status", [429, 500, 503, 504])
def test_failures_of_the_backend_are_documented(status) -> None:
    response = connect(Script([ApiError("x", status=status)])).post(CHAT, json=question())
    documented = DOCUMENT["paths"][CHAT]["post"]["responses"][str(status)]
    assert response.status_code == status
    reference = documented["content"]["application/json"]["schema"]["$ref"]
    fields = DOCUMENT["components"]["schemas"][reference.rpartition("/")[2]]["properties"]
    assert response.json().keys() == fields.keys() == {"error"}


def test_the_document_is_complete_but_not_served() -> None:
    client = TestClient(APP, headers={"Authorization": f"Bearer {KEY}"})
    assert client.get("/openapi.json").status_code == 404
    assert DOCUMENT["paths"].keys() == {
        "/health/live", "/health/ready", "/metrics", "/v1/models", "/v1/models/{name}", CHAT,
        "/v1/frames",
    }  # fmt: skip
    chat = DOCUMENT["paths"][CHAT]["post"]
    statuses = {"200", "400", "401", "404", "408", "413", "429", "500", "503", "504"}
    assert chat["responses"].keys() == statuses
    assert "422" not in str(DOCUMENT)
    fields = chat["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert {"model", "messages", "stop", "seed"} < fields.keys()


def test_a_wrong_method_is_told_the_right_one() -> None:
    response = TestClient(APP).get(CHAT)
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
