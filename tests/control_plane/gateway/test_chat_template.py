from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from control_plane.errors import InvalidRequest
from control_plane.gateway.chat_template import ChatTemplate, load_chat_template

TALK = [
    {"role": "system", "content": 'Be <brief> & "kind".'},
    {"role": "user", "content": "naïve 水?\n"},
    {"role": "assistant", "content": "  yes  "},
    {"role": "user", "content": "{{ bos_token }}<end>"},
]
TEMPLATES = {
    "own": None,
    "whitespace": """
{%- for message in messages %}
    {%- if loop.first and message.role == 'system' %}
        {%- set preamble = message.content | trim %}
        {%- continue %}
    {%- endif %}
    {% if message.role == 'user' %}[INST] {{ preamble | default('') }} {{ message.content }} [/INST]
    {%- else %} {% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}{% endif %}
{% endfor %}
{% if add_generation_prompt %}>{% endif %}
""",
    "json": "{% for m in messages %}{{ m | tojson }}{{ m | tojson(indent=2) }}{% endfor %}{{ tools is none }}",
    "namespace": (
        "{% set ns = namespace(n=0) %}"
        "{% for m in messages %}{% set ns.n = ns.n + m.content | length %}{% endfor %}"
        "{{ ns.n }}{{ messages[0]['role'] }}{{ messages[-1].content.strip().upper() }}{{ strftime_now('%Y') | length }}"
    ),
}


@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_renders_as_transformers_does(model_path: Path, name: str, add_generation_prompt: bool) -> None:
    oracle = AutoTokenizer.from_pretrained(str(model_path))
    source = TEMPLATES[name] or oracle.chat_template
    expected = oracle.apply_chat_template(
        TALK, chat_template=source, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    template = ChatTemplate(source, special_tokens={"bos_token": "<bos>", "eos_token": "<eos>"})
    assert template.render(TALK, add_generation_prompt=add_generation_prompt) == expected


def test_loads_what_transformers_loads(model_path: Path) -> None:
    template = load_chat_template(model_path)
    assert template is not None
    oracle = AutoTokenizer.from_pretrained(str(model_path))
    expected = oracle.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    assert template.render(TALK, add_generation_prompt=True) == expected


def test_a_template_file_goes_before_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(
        '{"chat_template": "config", "bos_token": {"content": "<b>"}}'
    )
    first = load_chat_template(tmp_path)
    assert first is not None
    assert first.render([], add_generation_prompt=False) == "config"
    (tmp_path / "chat_template.jinja").write_text("file {{ bos_token }}")
    second = load_chat_template(tmp_path)
    assert second is not None
    assert second.render([], add_generation_prompt=False) == "file <b>"


def test_named_templates_use_the_default_one(tmp_path: Path) -> None:
    named = '[{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]'
    (tmp_path / "tokenizer_config.json").write_text(f'{{"chat_template": {named}}}')
    template = load_chat_template(tmp_path)
    assert template is not None
    assert template.render([], add_generation_prompt=False) == "d"


def test_a_directory_without_a_template_has_none(tmp_path: Path) -> None:
    assert load_chat_template(tmp_path) is None


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no system role') }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages[9].content.x }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
    ],
)
def test_what_a_template_refuses_or_may_not_do_is_an_invalid_request(source: str) -> None:
    template = ChatTemplate(source, special_tokens={})
    messages: list[dict[str, Any]] = [{"role": "user", "content": "x"}]
    with pytest.raises(InvalidRequest) as caught:
        template.render(messages, add_generation_prompt=True)
    assert caught.value.param == "messages"


def test_a_template_that_is_no_jinja_is_refused_at_the_start() -> None:
    with pytest.raises(ValueError, match="no valid Jinja"):
        ChatTemplate("{% for %}", special_tokens={})
