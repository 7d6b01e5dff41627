"""Chat templates for vLLM, which hands content on in parts: they render what the processor renders without vLLM."""

import pytest
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from palkernels.model import AUDIO_TOKEN, byte_tokenizer
from palkernels.model.pal.messages import PLAIN_TEMPLATE, ChatTemplate, conversations_of
from palkernels.model.vllm.templates import in_parts


def text(content):
    return {"type": "text", "text": content}


TEMPLATES = {
    "strings": PLAIN_TEMPLATE,
    "trimmed strings": "{{ bos }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim }}{% endfor %}",
    "parts of text": "{% for m in messages %}{{ m['role'] }}{% for part in m['content'] %}"
    "{% if part['type'] == 'text' %} {{ part['text'] }}{% endif %}{% endfor %};{% endfor %}",
    "parts of both": "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{{ part['text'] if part['type'] == 'text' else '<|AUDIO|>' }}{% endfor %}"
    "{% endif %};{% endfor %}",
}  # fmt: skip
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [text("Hear "), {"type": "audio", "audio": "x"}, text("and say")]},
    {"role": "assistant", "content": [text("A bell")]},
    {"role": "user", "content": [{"type": "audio", "audio": "y"}, text("?")]},
]


@pytest.mark.parametrize("name", TEMPLATES)
def test_parts_are_rendered_as_without_vllm(name):
    source, special = TEMPLATES[name], byte_tokenizer().special_tokens_map
    (dialogue,), _ = conversations_of(CONVERSATION, AUDIO_TOKEN)
    expected = ChatTemplate(source, AUDIO_TOKEN, special).text(dialogue)
    assert expected.count(AUDIO_TOKEN) == 2
    # What vLLM makes of a request: every content in parts, and a clip's without the clip.
    parts = [
        {
            "role": message["role"],
            "content": [text(message["content"])]
            if isinstance(message["content"], str)
            else [part if part["type"] == "text" else {"type": "audio"} for part in message["content"]],
        }
        for message in CONVERSATION
    ]
    ours = in_parts(source, AUDIO_TOKEN, special)
    rendered = render_jinja_template([parts], chat_template=ours, **special)[0][0]
    assert rendered == expected


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
@pytest.mark.parametrize("parts", [False, True])
def test_an_audio_token_in_a_text_is_refused_as_without_vllm(name, role, parts):
    written = f"Hear {AUDIO_TOKEN}"
    conversation = [*CONVERSATION, {"role": role, "content": [text("And:"), text(written)] if parts else written}]
    special = byte_tokenizer().special_tokens_map
    with pytest.raises(ValueError, match=r"got '<\|AUDIO\|>' in a text"):
        conversations_of(conversation, AUDIO_TOKEN)
    with pytest.raises(TemplateError, match=r"text must not hold <\|AUDIO\|>"):
        render_jinja_template([conversation], chat_template=in_parts(TEMPLATES[name], AUDIO_TOKEN, special), **special)
