"""Whose a request is, from the client's header to what the dispatcher is asked."""

from dataclasses import replace

import httpx
import pytest

from control_plane.errors import InvalidRequest
from control_plane.gateway.app import create_app
from control_plane.gateway.metrics import GatewayMetrics
from control_plane.gateway.settings import GatewaySettings
from control_plane.gateway.tenancy import Tenancy, Tenant, parse_weights
from control_plane.gateway.tokenizer import TextTokenizer
from tests.control_plane.gateway.scripted import MODEL, ScriptedDispatcher

TENANCY = Tenancy(header="X-Tenant", weights=parse_weights("gold=3, free=0.5"))
BODY = {"model": MODEL, "prompt": "x", "max_tokens": 1, "n": 2}


@pytest.fixture
def settings(settings: GatewaySettings) -> GatewaySettings:
    return replace(settings, tenancy=TENANCY)


def test_a_tenant_is_named_by_the_header_and_weighs_what_the_operator_says() -> None:
    assert TENANCY.tenant_of([("x-tenant", "gold")]) == Tenant("gold", 3.0)
    assert TENANCY.tenant_of([("X-Tenant", "other")]) == Tenant("other", 1.0)
    assert TENANCY.tenant_of([("x-other", "gold")]) == Tenant("", 1.0)


def test_without_a_trusted_header_nobody_can_pose_as_another() -> None:
    assert Tenancy().tenant_of([("x-tenant", "gold"), ("", "gold")]) == Tenant()


@pytest.mark.parametrize("name", ["a b", "é", "x" * 129, "a\n"])
def test_a_name_that_nobody_can_have_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match="X-Tenant must name a tenant"):
        TENANCY.tenant_of([("x-tenant", name)])


def test_a_tenant_that_is_named_twice_is_refused_even_if_both_say_the_same() -> None:
    with pytest.raises(InvalidRequest, match="X-Tenant must come once, got 2"):
        TENANCY.tenant_of([("x-tenant", "gold"), ("X-Tenant", "gold")])


async def test_an_http_request_that_names_two_tenants_is_refused(http: httpx.AsyncClient) -> None:
    headers = [("X-Tenant", "gold"), ("X-Tenant", "free")]
    reply = await http.post("/v1/completions", json=BODY, headers=headers)
    assert (reply.status_code, reply.json()["error"]["type"]) == (400, "invalid_request_error")
    assert "must come once" in reply.json()["error"]["message"]


@pytest.mark.parametrize("text", ["gold", "gold=", "=3", "gold=0", "gold=nan", "gold=1e9", "a=1,a=2"])
def test_weights_that_say_nothing_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be NAME=WEIGHT"):
        parse_weights(text)


async def test_every_generation_of_an_http_request_is_its_tenants(
    http: httpx.AsyncClient, dispatcher: ScriptedDispatcher
) -> None:
    reply = await http.post("/v1/completions", json=BODY, headers={"X-Tenant": "gold"})
    assert reply.status_code == 200
    assert [(g.tenant, g.tenant_weight) for g in dispatcher.generations] == [("gold", 3.0)] * 2
    reply = await http.post("/v1/completions", json=BODY, headers={"X-Tenant": "not one"})
    assert (reply.status_code, reply.json()["error"]["type"]) == (400, "invalid_request_error")


async def test_a_header_that_the_operator_does_not_trust_counts_for_nothing(
    dispatcher: ScriptedDispatcher,
    tokenizer: TextTokenizer,
    settings: GatewaySettings,
    metrics: GatewayMetrics,
) -> None:
    app = create_app(
        dispatcher=dispatcher,
        tokenizer=tokenizer,
        settings=replace(settings, tenancy=Tenancy()),
        metrics=metrics,
    )
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as http:
        await http.post("/v1/completions", json=BODY, headers={"X-Tenant": "gold"})
    assert {g.tenant for g in dispatcher.generations} == {""}
