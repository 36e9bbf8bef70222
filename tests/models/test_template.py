"""Chat templates: what transformers makes of them, and no more than a bounded time, memory and length."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from uqff import FormatError, UnsupportedError
from uqff.models.template import render

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Grüße <|im_end|> {{ x }}\n"}]
GIVEN: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "tools": None, "documents": None}

TEMPLATES = [
    # ChatML, as Qwen's
    "{% for message in messages %}\n{{ '<|im_start|>' + message['role'] + '\\n' "
    "+ message.content|trim + '<|im_end|>' }}\n{% endfor %}\n{%- if add_generation_prompt %}\n"
    "    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}",
    # Mistral's: a namespace, slices, an exception not raised
    "{{ bos_token }}{% set ns = namespace(n=0) %}{% for m in messages[1:] %}{% if m.role == 'tool' %}"
    "{{ raise_exception('no') }}{% endif %}{% set ns.n = ns.n + 1 %}"
    "[INST] {{ m.content }} [/INST]{{ ns.n }}{% endfor %}",
    # what transformers adds to Jinja
    "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{% generation %}\n  {% set a = 1 %}"
    "{{ m|tojson }}{% endgeneration %}{{ a is defined }}{{ messages|tojson(indent=2) }}{% endfor %}"
    "{{ tools is none }}{{ strftime_now('x') }}",
    "{% macro said(m) %}{{ m.role.title() }}: {{ '%5.1f' % 2 }} {{ '{:>4}'.format(m.role[0]) }}{% endmacro %}\n"
    "{{ messages|map(attribute='role')|join(', ') }} {{ said(messages[0]) }} {{ none_such }} {{ dict(a=1) }}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_same_as_transformers(template: str) -> None:
    """To the letter, for what chat templates are made of."""
    (expected,), _ = render_jinja_template([CHAT], chat_template=template, add_generation_prompt=True, **GIVEN)
    assert render(template, {"messages": CHAT, "add_generation_prompt": True, **GIVEN}) == expected


LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ 'a' * 10**9 }}", "takes too much memory"),
        ("{{ 'a'.ljust(10**9)[0] }}", "takes too much memory"),
        ("{% set ns = namespace(a='a') %}{% for i in range(40) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}", "memory"),
        ("{{ 'ab'|indent(10**9) }}", "takes too much memory"),
        (LOOPS, "takes too long"),
        ("{{ 7**(7**9) % 10 }}", "takes too long"),
        (
            "{% for a in range(10**9) %}{% for b in range(10**9) %}{% endfor %}{% endfor %}",
            "template fails: got Range too big",
        ),
        ("{% for i in range(1100) %}{{ 'a' * 1000 }}{% endfor %}", "makes too long a text: expected at most 1000002 "),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "template fails: got maximum recursion depth"),
        ("{{ " + "(" * 50_000, "template fails"),
        ("a" * 1_000_001, "template is too long: expected at most 1000000 bytes, got 1000001"),
        ("{{ ''.__class__.__mro__ }}", "template fails: got access to attribute '__class__' of 'str' object is unsafe"),
        ("{% include 'a' %}", "template fails: got no loader for this environment"),
    ],
)
def test_bounded(template: str, problem: str) -> None:
    """A typed error in place of the time and the memory."""
    with pytest.raises(FormatError, match=problem):
        render(template, {})


def test_long_texts_are_put_into_a_template() -> None:
    """The bounds grow with what is asked."""
    text = "word " * 2_000_000
    assert render("[{{ text }}]", {"text": text}) == f"[{text}]"


def test_variables_are_written_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """They may be megabytes; what the renderer gets is that very text."""
    written = []

    def dumps(value: Any) -> str:
        written.append(json.dumps(value))
        return written[-1]

    monkeypatch.setattr("uqff.models.template.json", SimpleNamespace(dumps=dumps, loads=json.loads))
    assert render("[{{ text }}, {{ pair[1] }}]", {"text": 'ß"}', "pair": (1, None)}) == '[ß"}, None]'
    assert sum(r"\u00df\"}" in text for text in written) == 1


def test_a_system_without_an_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """An embedded Python knows of none; what its name then is, is not started."""
    monkeypatch.setattr("sys.executable", "")
    with pytest.raises(UnsupportedError, match="no Python interpreter"):
        render("", {})
