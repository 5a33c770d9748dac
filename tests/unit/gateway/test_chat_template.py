"""Chat templates render as Hugging Face transformers renders them, and cannot run away."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
from transformers import PreTrainedTokenizerFast

from contracts.errors import BadRequest, ConfigError
from gateway.chat_template import ChatTemplate
from tests.unit.gateway import tokenizers_for_tests as small

if TYPE_CHECKING:
    from collections.abc import Callable

HEADER_STYLE = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
<|header|>system<|end_header|>

{%- if tools is not none %}
    {{- "Environment: tools" }}
{%- endif %}
{{- system_message }}<|eot|>
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|header|>' + message['role'] + '<|end_header|>\\n\\n' + message['content'] | trim + '<|eot|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|header|>assistant<|end_header|>\\n\\n' }}
{%- endif %}
"""

CHATML_STYLE = """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are a helper.<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last_user=-1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if ns.last_user == -1 and message.role == "user" and message.content is string and
           not (message.content.startswith('<response>') and message.content.endswith('</response>')) %}
        {%- set ns.last_user = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == "assistant" and '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {%- if not loop.first or message.role != 'system' %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- endif %}
    {%- if loop.index0 == ns.last_user %}{{- '<!-- last user -->' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

INST_STYLE = """{{ bos_token }}{% for message in messages if message['role'] != 'system' %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
    {% if message['role'] == 'user' %}
{{ '[INST] ' + message['content'] + ' [/INST]' }}
    {% elif message['role'] == 'assistant' %}
{% generation %}
{{ message['content'] + eos_token }}
    {%- endgeneration -%}
    {% else %}
{{ raise_exception('Only user and assistant roles are supported!') }}
    {% endif %}
{% endfor %}"""

FILTERS = """{% for message in messages %}{% if loop.index > 3 %}{% break %}{% endif %}
{{ message | tojson }}{{ message.content | upper | replace('A', 'b') }}
{{ {'k': [1, 2.5, none, true, 'é<&>']} | tojson(indent=2) }}{{ message.get('name', 'nobody') }}
{{ message.items() | list | length }}{{ [1, 2, 3] | join('-') }}{{ message.content[0:2] }}{{ 7 // 2 }}
{% endfor %}{{ undefined_name }}{% macro m(x) %}({{ x }}){% endmacro %}{{ m(3) }}{{ 'a' ~ 1 }}"""

CONVERSATION: list[dict[str, Any]] = [
    {"role": "system", "content": "  Be brief. "},
    {"role": "user", "content": "Hé <b>llo</b>\n"},
    {"role": "assistant", "content": "<think>hm</think>\n\nHi & welcome"},
    {"role": "user", "content": "What's {{ 1 + 1 }}?"},
]


def reference(template: str, messages: list[dict[str, Any]], **variables: Any) -> str:
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=small.byte_level(), bos_token="<s>", eos_token="</s>"
    )
    apply: Callable[..., object] = getattr(tokenizer, "apply_chat_template")  # noqa: B009 (typed loosely there)
    text = apply(messages, chat_template=template, tokenize=False, **variables)
    assert isinstance(text, str)
    return text


def ours(source: str) -> ChatTemplate:
    return ChatTemplate(source, special_tokens={"bos_token": "<s>", "eos_token": "</s>"}, wall_s=lambda: 86_400.0)


@pytest.mark.parametrize("source", [HEADER_STYLE, CHATML_STYLE, INST_STYLE, FILTERS])
@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("prompt", [True, False])
def test_renders_as_transformers_does(source: str, start: int, prompt: bool) -> None:
    messages = CONVERSATION[start:]
    expected = reference(source, messages, add_generation_prompt=prompt)
    assert ours(source).render(messages, add_generation_prompt=prompt) == expected


def test_template_variables_are_passed_on() -> None:
    expected = reference(CHATML_STYLE, CONVERSATION, add_generation_prompt=True, enable_thinking=False)
    variables: dict[str, object] = {"enable_thinking": False, "messages": []}
    assert ours(CHATML_STYLE).render(CONVERSATION, variables=variables) == expected


def test_the_date_comes_from_the_clock() -> None:
    assert re.fullmatch(r"1970-01-0[123]", ours("{{ strftime_now('%Y-%m-%d') }}").render([]))


def _nested_loops(depth: int) -> str:
    loops = "".join(f"{{% for x{level} in range(1000) %}}" for level in range(depth))
    return loops + "x" + "{% endfor %}" * depth


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('no such role') }}", "the chat template refused: no such role"),
        (_nested_loops(4), "the chat template failed: .*fuel"),
        ("{{ messages.nothing.deeper }}", "the chat template failed: "),
        ("{{ 1 + 'a' }}", "the chat template failed: "),
    ],
)
def test_a_failing_template_is_the_requests_error(source: str, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        ours(source).render([])


@pytest.mark.parametrize("source", ["{% if %}", "{{ open", "{% unknown %}"])
def test_a_syntax_error_is_found_when_loading(source: str) -> None:
    with pytest.raises(ConfigError, match="the chat template cannot be used"):
        ours(source)


@pytest.mark.parametrize("source", ["{{ ''.__class__ }}", "{{ messages.__class__.__mro__ }}"])
def test_the_sandbox_shows_no_python(source: str) -> None:
    try:
        assert ours(source).render([]) == ""
    except BadRequest:
        return


def test_a_message_is_data_not_template() -> None:
    messages = [{"role": "user", "content": "{{ 6 * 7 }}{% for %}"}]
    assert ours("{{ messages[0].content }}").render(messages) == "{{ 6 * 7 }}{% for %}"
