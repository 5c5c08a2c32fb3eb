"""Chat templates of hub_cards/serve.py, which anyone may have written."""

import types

import httpx
import pytest
import serve_templates
from serve import Limits, load, make_app
from serve_errors import RequestError
from serve_templates import ChatTemplate
from serving import serving


@pytest.fixture(scope="module")
def checkpoint():
    return load("hub_cards/tiny-qgsa")


@pytest.fixture(scope="module")
def with_template(checkpoint):
    """A processor with another template."""
    tokenizer = checkpoint[1].tokenizer
    return lambda template: types.SimpleNamespace(tokenizer=tokenizer, chat_template=template)


def turn(role, *texts):
    return {"role": role, "content": [{"type": "text", "text": text} for text in texts]}


def test_a_prompt_is_that_of_the_processor(checkpoint):
    processor = checkpoint[1]
    template = ChatTemplate(processor, 1, 10_000)
    try:
        for turns in (
            serve_templates.EXAMPLE,
            [
                turn("system", "be nice \N{SNOWMAN}"),
                turn("user", "a", "b\n"),
                turn("assistant", ""),
                turn("user", "<a>"),
            ],
        ):
            assert template.apply(turns) == processor.apply_chat_template(turns, add_generation_prompt=True)
        with pytest.raises(RequestError, match=r"messages: the prompt's \d+ characters exceed the 10000") as raised:
            template.apply([turn("user", "a" * 10_000)])
        assert raised.value.code == "context_length_exceeded"
    finally:
        template.close()


NESTED = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    "template, message",
    [
        (NESTED, "the chat template takes more than 1.5 s or 1024 MB"),
        ("{{ 'a' * 4000000000 }}", "the chat template takes more than 1.5 s or 1024 MB"),
        ("{% set n = namespace(a='ab') %}{% for i in range(50) %}{% set n.a = n.a ~ n.a %}{% endfor %}", "takes more"),
        ("{{ 'a' * 9000000 }}", r"the prompt's 9000000 characters exceed the \d+ that fit"),
        ("{{ raise_exception('no images') }}", r"the chat template fails \(TemplateError: no images\)"),
        ("{{ messages.append(1) }}", "the chat template fails .SecurityError"),
        ("{% for %}", "the chat template fails .TemplateSyntaxError"),
        ("(" * 10 + "{{ " + "(" * 5000 + ")" * 5000 + " }}", "the chat template"),
    ],
)
def test_templates_that_are_not_served(template, message, checkpoint, with_template, monkeypatch):
    monkeypatch.setattr(serve_templates, "SECONDS", 1.5)
    with pytest.raises(ValueError, match=message):
        make_app(checkpoint[0], with_template(template), Limits())


def test_a_template_that_fails_later(monkeypatch):
    """On one word only: that request ends, and the next is answered."""
    model, processor = load("hub_cards/tiny-qgsa")
    processor.chat_template = "{% if messages[0].content[0].text == 'boom' %}" + NESTED + "{% endif %}a"
    with serving(make_app(model, processor, Limits())) as url:
        monkeypatch.setattr(serve_templates, "SECONDS", 1)
        for text, status in (("hello", 200), ("boom", 400)):
            body = {"messages": [turn("user", text)], "max_tokens": 1}
            response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30)
            assert response.status_code == status
        assert "the chat template takes more than 1 s" in response.json()["error"]["message"]
        monkeypatch.setattr(serve_templates, "SECONDS", 10)
        body["messages"] = [turn("user", "hello")]
        assert httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30).status_code == 200
