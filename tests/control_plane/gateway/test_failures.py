import pytest

from control_plane import errors
from control_plane.gateway.failures import FAILURES, error_body, failure_of, retry_after_s


def subclasses(kind: type) -> set[type]:
    return {sub for child in kind.__subclasses__() for sub in {child, *subclasses(child)}}


def test_every_error_that_a_client_may_see_has_a_row() -> None:
    assert subclasses(errors.RequestError) == set(FAILURES)


@pytest.mark.parametrize(("seconds", "header"), [(0.0, 1), (1.0, 1), (1.01, 2), (30.0, 30)])
def test_retry_after_is_rounded_up_to_whole_seconds(seconds: float, header: int) -> None:
    assert retry_after_s(errors.QueueFull("full", retry_after_s=seconds)) == header


def test_a_bodys_code_is_the_errors_own_or_the_rows() -> None:
    own = errors.InvalidRequest("m", param="p", code="c")
    assert error_body(own)["error"] == {
        "message": "m",
        "type": "invalid_request_error",
        "param": "p",
        "code": "c",
    }
    assert error_body(errors.ModelNotFound("m"))["error"]["code"] == "model_not_found"
    assert failure_of(own).http_status == 400
