import time

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError

from stsr_core.errors import StoreError
from stsr_core.store.patience import may_pass, require_answer


def answer(status: int) -> ClientError:
    return ClientError({"ResponseMetadata": {"HTTPStatusCode": status}, "Error": {}}, "PutObject")


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (EndpointConnectionError(endpoint_url="http://x"), True),
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (answer(503), True),
        (answer(429), True),
        (answer(412), False),  # of a conditional write: somebody else was first
        (answer(403), False),
        (FileNotFoundError(), False),
        (PermissionError(), False),
        (ValueError(), False),
    ],
)
def test_outages_pass_and_refusals_do_not(error, passes):
    assert may_pass(error) == passes


def test_a_server_that_never_answered_is_an_error_within_seconds():
    options = {"endpoint_url": "http://127.0.0.1:9", "key": "a", "secret": "b"}
    started = time.monotonic()
    with pytest.raises(
        StoreError, match=r"s3://bucket/store cannot be reached at http://127.0.0.1:9: .*STSR_S3_ENDPOINT"
    ):
        require_answer("s3://bucket/store", options)
    assert time.monotonic() - started < 60
