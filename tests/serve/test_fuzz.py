"""Whatever is sent, the server answers in its own words: no 500, no 422, and it goes on."""

import json

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanochat_jax.serve.schema import REFUSED, ChatBody, CompletionBody

FIELDS = sorted({*ChatBody.model_fields, *CompletionBody.model_fields, *REFUSED} - {"max_tokens"})
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
GOOD_CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
GOOD_TEXT = {"prompt": "hi", "max_tokens": 2}
ROLES = st.sampled_from(["user", "assistant", "system", "developer", "tool"])
PARTS = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "python", "python_output", "image_url"]), "text": st.text()}
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": ROLES, "content": st.text() | st.lists(PARTS) | JSON}),
    max_size=6,
)
MANY = settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def post(scripted_once):
    """post(path, content): with one connection for all that is tried."""
    headers = {"content-type": "application/json"}
    with httpx.Client(base_url=scripted_once.url, timeout=30, headers=headers) as client:
        yield lambda path, content: client.post(path, content=content)


def check(post, path, body):
    answer = post(path, json.dumps(body).encode())
    assert answer.status_code in (200, 400, 404), (body, answer.status_code, answer.text)
    if answer.status_code != 200:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    elif isinstance(body, dict) and body.get("stream"):
        assert answer.text.endswith("data: [DONE]\n\n") and '"error"' not in answer.text
    else:
        assert {c["finish_reason"] for c in answer.json()["choices"]} <= {"stop", "length"}


@MANY
@given(changes=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3))
def test_any_value_of_any_field(post, changes):
    check(post, "/v1/chat/completions", GOOD_CHAT | changes)
    check(post, "/v1/completions", GOOD_TEXT | changes)


@MANY
@given(messages=MESSAGES, stream=st.booleans())
def test_any_messages(post, messages, stream):
    body = GOOD_CHAT | {"messages": messages, "stream": stream}
    check(post, "/v1/chat/completions", body)


@MANY
@given(body=JSON)
def test_any_json(post, body):
    for path in ("/v1/chat/completions", "/v1/completions"):
        check(post, path, body)


@pytest.mark.slow
def test_what_the_openapi_document_allows_and_what_it_does_not(scripted_once):
    schemathesis = pytest.importorskip("schemathesis")
    from schemathesis import checks

    document = httpx.get(scripted_once.url + "/openapi.json").json()
    schema = schemathesis.openapi.from_dict(document)
    wanted = [
        checks.not_a_server_error,
        schemathesis.specs.openapi.checks.status_code_conformance,
        schemathesis.specs.openapi.checks.content_type_conformance,
        schemathesis.specs.openapi.checks.response_schema_conformance,
    ]
    seen = set()
    for result in schema.get_all_operations():
        operation = result.ok()

        @settings(max_examples=20, suppress_health_check=list(HealthCheck), deadline=None)
        @given(case=operation.as_strategy())
        def run(case):
            response = case.call(base_url=scripted_once.url)
            assert response.status_code != 422
            case.validate_response(response, checks=wanted)

        run()
        seen.add(operation.path)
    assert {"/v1/chat/completions", "/v1/completions", "/tokenize", "/health"} <= seen
