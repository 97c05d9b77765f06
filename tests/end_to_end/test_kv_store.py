"""KV computed once is loaded from whichever tier still holds it: the same text, for the same tenant.

How much is loaded depends on time, as what comes late is computed; what is found does not.
"""

import pytest
from openai import OpenAI

from control_plane.cli.tiers import drop
from tests.end_to_end.asking import LOADABLE_TOKENS, ask, converse, prompt, workers
from tests.end_to_end.kv_site import PAST_THE_MEMORY, PAST_THE_PAGES, Site


def test_each_turn_of_a_conversation_loads_the_turns_before(site: Site, plain: OpenAI) -> None:
    questions = [f"What is {number} plus 7? " * 12 for number in range(3)]
    turns = converse(site.client, questions, lambda: site.fill(PAST_THE_PAGES))
    expected = converse(plain, questions, lambda: None)
    assert [text for text, _ in turns] == [text for text, _ in expected]
    counts = [num for _, num in turns]
    assert 0 == counts[0] < counts[1] < counts[2]


def test_a_system_prompt_is_loaded_for_the_next_user(site: Site, plain: OpenAI) -> None:
    def between() -> None:
        site.fill(PAST_THE_PAGES)

    converse(site.client, ["Name a colour."], between)
    [(text, num)] = converse(site.client, ["Name a town."], between)
    assert num > 0
    assert text == converse(plain, ["Name a town."], lambda: None)[0][0]


@pytest.mark.parametrize(("tier", "others"), [("memory", PAST_THE_PAGES), ("disk", PAST_THE_MEMORY)])
def test_what_left_the_pages_is_loaded(site: Site, plain: OpenAI, tier: str, others: range) -> None:
    asked = prompt(10 + len(tier))
    expected = ask(plain, asked).text
    assert ask(site.client, asked).text == expected
    site.fill(others)
    before = site.num_hits(tier)
    answer = ask(site.client, asked)
    assert answer.text == expected
    assert 0 < answer.num_cached_tokens <= LOADABLE_TOKENS
    assert site.num_hits(tier) > before


def test_a_tenant_never_gets_what_another_one_computed(site: Site) -> None:
    """Not from pages, not from memory, not from disk."""
    asked = prompt(20)
    assert ask(site.client, asked, salt="a").num_cached_tokens == 0
    for salt, others in (("b", range(0)), ("c", PAST_THE_PAGES), ("", PAST_THE_MEMORY)):
        site.fill(others)
        assert ask(site.client, asked, salt=salt).num_cached_tokens == 0
        assert ask(site.client, asked, salt="a").num_cached_tokens > 0


def test_a_restarted_cluster_loads_what_it_computed_and_nothing_that_was_dropped(
    site: Site, plain: OpenAI
) -> None:
    asked, dropped = prompt(30), prompt(31)
    ask(site.client, asked, salt="a")
    ask(site.client, dropped, salt="gone")
    site.wait_until_idle()
    [answer] = drop(workers(site.cluster), cache_salt="gone")
    assert answer.reply is not None
    assert answer.reply.num_blocks >= 2 * LOADABLE_TOKENS // 16
    site.restart()
    assert ask(site.client, asked, salt="b").num_cached_tokens == 0
    assert ask(site.client, dropped, salt="gone").num_cached_tokens == 0
    loaded = ask(site.client, asked, salt="a")
    assert loaded.num_cached_tokens > 0
    assert loaded.text == ask(plain, asked).text
    assert site.num_hits("disk") >= LOADABLE_TOKENS // 16
