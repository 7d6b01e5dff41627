"""Conversations: every form of message that transformers' processors render, through every form of template."""

import pytest
from support.audio_llm import AUDIO_TOKEN, TOKENIZER, entry, tone
from support.releases import IS_NEWEST
from transformers import Qwen2AudioProcessor, WhisperFeatureExtractor

from palkernels.model import PalProcessor, byte_tokenizer

# Each after a form that published templates have.
STRINGS = "{% for m in messages %}[{{ m.role }}]{{ m['content'] | trim }}{% endfor %}"
PARTS = (
    "{% for m in messages %}[{{ m.role }}]{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}"
    "{% elif part.type == 'audio' %}(<|AUDIO|>){% endif %}{% endfor %}{% endfor %}"
)
AUDIO_FIRST = (
    "{% for m in messages %}[{{ m.role }}]{% for part in m.content | selectattr('type', 'equalto', 'audio') %}"
    "<|AUDIO|> {% endfor %}{% for part in m.content | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}"
    "{% endfor %}{% endfor %}"
)
TEXT_PARTS = (
    "{% for m in messages %}[{{ m.role }}]{% for part in m['content'] %}{% if part['type'] == 'text' %}"
    "{{ part['text'] }}{% elif part['type'] == 'image' %}<image>{% endif %}{% endfor %}{% endfor %}"
)
EITHER = (
    "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if 'audio' in part or 'audio_url' in part %}<b><|AUDIO|></b>"
    "{% elif 'text' in part %}{{ part.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
)
STRINGS_ELSE_NOTHING = (
    "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}{% endif %}{% endfor %}"
)
OTHER_TOKEN = EITHER.replace("<|AUDIO|>", "<sound>")  # parts of audio are of no use then
PICKY = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system') }}{% endif %}" + STRINGS
FIRST_PART = "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'][0]['text'] }}{% endfor %}"
CONVERSATION = [
    {"role": "system", "content": "Listen."},
    {"role": "user", "content": [{"type": "text", "text": "Is"}, {"type": "audio", "audio": tone()}]},
    {"role": "assistant", "content": [{"type": "text", "text": "Yes"}, {"type": "text", "text": "."}]},
]
RENDERED = {
    "strings": (STRINGS, "[system]Listen.[user]Is<|AUDIO|>[assistant]Yes."),
    "parts": (PARTS, "[system]Listen.[user]Is(<|AUDIO|>)[assistant]Yes."),
    "audio first": (AUDIO_FIRST, "[system]Listen.[user]<|AUDIO|> Is[assistant]Yes."),
    "text parts": (TEXT_PARTS, "[system]Listen.[user]Is<|AUDIO|>[assistant]Yes."),
    "either": (EITHER, "[system]Listen.[user]Is<b><|AUDIO|></b>[assistant]Yes."),
    "strings, else nothing": (STRINGS_ELSE_NOTHING, "[system]Listen.[user]Is<|AUDIO|>[assistant]Yes."),
    "another token": (OTHER_TOKEN, "[system]Listen.[user]Is<|AUDIO|>[assistant]Yes."),
    "picky": (PICKY, "[system]Listen.[user]Is<|AUDIO|>[assistant]Yes."),
    "printed": ("{{ messages[1]['content'] }}!", "Is<|AUDIO|>!"),
}


@pytest.fixture(scope="module")
def processor():
    return PalProcessor(TOKENIZER, [entry("whisper", "plits")])


@pytest.mark.parametrize("name", RENDERED)
def test_templates_of_every_form(processor, name):
    template, want = RENDERED[name]
    assert processor.apply_chat_template(CONVERSATION, template) == want
    batch = processor.apply_chat_template(CONVERSATION, template, tokenize=True, sampling_rate=16_000)
    assert TOKENIZER.decode(batch["input_ids"][0]) == want.replace(AUDIO_TOKEN, AUDIO_TOKEN * 5)
    assert CONVERSATION[1]["content"][1]["type"] == "audio"  # the caller's messages stay as they are
    assert "audio" in CONVERSATION[1]["content"][1]


def test_a_template_that_reads_one_part(processor):
    """It renders texts, and a clip in a second part is not lost without a word."""
    conversation = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
    ]
    assert processor.apply_chat_template(conversation, FIRST_PART) == "[user]hi[assistant]a"
    with pytest.raises(ValueError, match=r"must render each clip's .* once, 1 in all, got 0"):
        processor.apply_chat_template(CONVERSATION, FIRST_PART)


CALL = {"type": "function", "function": {"name": "hear", "arguments": {"seconds": 3}}}
TOOLS = (
    "{% for tool in tools or [] %}<{{ tool.function.name }}>{% endfor %}"
    "{% for document in documents or [] %}<{{ document.title }}>{% endfor %}"
    "{% for m in messages %}[{{ m.role }}{{ ' ' + m.name if m.name else '' }}]{{ m.content or '' }}"
    "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}"
    "{% for call in m.tool_calls or [] %}{{ call.function.name }}({{ call.function.arguments | tojson }}){% endfor %}"
    "{% endfor %}"
)
WITHOUT_TEXT = {
    "None": {"role": "assistant", "content": None, "tool_calls": [CALL]},
    "no key": {"role": "assistant", "tool_calls": [CALL]},
    "None and None": {"role": "assistant", "content": None, "tool_calls": [CALL], "name": None},
    "no parts": {"role": "assistant", "content": [], "tool_calls": [CALL]},
    "text of None": {"role": "assistant", "content": [{"type": "text", "text": None}], "tool_calls": [CALL]},
}


@pytest.mark.parametrize("name", WITHOUT_TEXT)
def test_messages_without_text(processor, name):
    heard = {"role": "user", "content": [{"type": "audio", "audio": tone()}]}
    answer = {"role": "tool", "name": "hear", "content": "a tone"}
    conversation = [heard, WITHOUT_TEXT[name], answer]
    want = '[user]<|AUDIO|>[assistant]hear({"seconds": 3})[tool hear]a tone'
    assert processor.apply_chat_template(conversation, TOOLS) == want
    parts = PARTS.replace("{% endfor %}{% endfor %}", "{% endfor %}{% if m.tool_calls %}call{% endif %}{% endfor %}")
    assert processor.apply_chat_template(conversation, parts) == "[user](<|AUDIO|>)[assistant]call[tool]a tone"
    if name in ("None", "no key"):  # as the tokenizer renders them
        text = [{"role": "user", "content": "hi"}, WITHOUT_TEXT[name], answer]
        want = TOKENIZER.apply_chat_template(text, chat_template=TOOLS, tokenize=False)
        assert processor.apply_chat_template(text, TOOLS) == want


def test_keys_that_pyarrow_fills_in(processor):
    content = [
        {"type": "audio", "audio": tone(), "path": None, "text": None},
        {"type": "text", "audio": None, "path": None, "text": "a"},
        {"type": "text", "audio": None, "path": None, "text": None},
    ]
    message = {"role": "user", "content": content, "tool_calls": None}
    assert processor.apply_chat_template([message], PARTS) == "[user](<|AUDIO|>)a"
    assert processor.apply_chat_template([message], STRINGS) == "[user]<|AUDIO|>a"


def test_tools_documents_and_other_keys(processor):
    def shout(word: str) -> str:
        """Say a word loudly.

        Args:
            word: what to say
        """
        return word.upper()

    conversation = [{"role": "user", "content": "hi", "reasoning_content": "why"}]
    more = {"tools": [shout, {"function": {"name": "whisper"}}], "documents": [{"title": "T", "text": "t"}]}
    got = processor.apply_chat_template(conversation, TOOLS, **more)
    assert got == "<shout><whisper><T>[user]hi(why)"
    assert got == TOKENIZER.apply_chat_template(conversation, chat_template=TOOLS, tokenize=False, **more)
    for name, value in more.items():
        with pytest.raises(ValueError, match=f"{name} must be None for a chat template that does not name them, got"):
            processor.apply_chat_template(conversation, STRINGS, **{name: value})


@pytest.mark.parametrize("name", [*WITHOUT_TEXT, "parts", "system"])
def test_conversations_are_rendered_as_by_qwen2_audio(processor, name):
    """With its template: text, and the ids where no clip has placeholders."""
    own = Qwen2AudioProcessor(WhisperFeatureExtractor(), byte_tokenizer())
    clip = tone().numpy()
    content = [{"type": "audio", "audio": clip}, {"type": "text", "text": "What?"}, {"type": "audio", "audio": clip}]
    last = {"parts": {"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}}
    last |= {"system": {"role": "system", "content": "s"}} | WITHOUT_TEXT
    conversation = [{"role": "user", "content": content}, {"role": "assistant", "content": "hi"}, last[name]]
    if name == "text of None":  # it writes "None"
        conversation[2] = {**last[name], "content": []}
    lal = PalProcessor(TOKENIZER, [entry("sslam")])
    for messages in (conversation, [conversation, conversation[:1]], conversation[1:2]):
        more = {"add_generation_prompt": True}
        try:
            want = own.apply_chat_template(messages, **more)
        except TypeError:  # transformers 5.17 renders no message without content
            assert name in WITHOUT_TEXT
            assert not IS_NEWEST
            continue
        assert processor.apply_chat_template(messages, own.chat_template, **more) == want
        batch = lal.apply_chat_template(messages, own.chat_template, **more, tokenize=True, sampling_rate=16_000)
        texts = [want] if isinstance(want, str) else want
        ids = TOKENIZER([text.replace(AUDIO_TOKEN, "") for text in texts], padding=True, padding_side="left")
        assert batch["input_ids"].tolist() == ids["input_ids"]


def test_templates_by_name(processor):
    templates = {"default": STRINGS, "tool_use": TOOLS, "parts": PARTS}
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = templates
    hi = [{"role": "user", "content": "hi"}]
    several = PalProcessor(TOKENIZER, processor.encoders, chat_template=templates)
    for named in (several, PalProcessor(tokenizer, processor.encoders)):
        assert named.apply_chat_template(hi) == "[user]hi"
        assert named.apply_chat_template(hi, tools=[{"function": {"name": "f"}}]) == "<f>[user]hi"
        assert named.apply_chat_template(CONVERSATION[1:2], "parts") == "[user]Is(<|AUDIO|>)"
    with pytest.raises(ValueError, match=r"must be one of \['default', 'parts', 'tool_use'\], got 'tools'"):
        several.apply_chat_template(hi, "tools")
    assert PalProcessor(tokenizer, processor.encoders, chat_template={"a": EITHER}).apply_chat_template(hi, "parts")
    unnamed = PalProcessor(TOKENIZER, processor.encoders, chat_template={"a": PARTS, "b": STRINGS})
    with pytest.raises(ValueError, match=r"chat_template must be one of \['a', 'b'\], got None"):
        unnamed.apply_chat_template(hi)


@pytest.mark.parametrize("template", [STRINGS, PARTS, TEXT_PARTS, EITHER], ids=["strings", "parts", "text", "either"])
def test_the_last_message_goes_on(processor, template):
    """As by the tokenizer, which is given what the template takes."""
    template += "{% if True %}<end>{% endif %}"
    conversation = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well, "}]
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in conversation]
    stock = conversation if template.startswith((STRINGS, EITHER)) else parts
    more = {"continue_final_message": True}
    want = TOKENIZER.apply_chat_template(stock, chat_template=template, tokenize=False, **more)
    assert not want.endswith("<end>")
    for given in (conversation, parts):
        assert processor.apply_chat_template(given, template, **more) == want
    with pytest.raises(ValueError, match="continue_final_message must be without generation prompt, labels and masks"):
        processor.apply_chat_template(conversation, template, **more, add_generation_prompt=True)


def test_what_no_template_may_do(processor):
    """A clip that is left out or said twice, and content that is not there, are refused before anything is encoded."""
    for template, count in (("{{ messages[0].role }}", 0), (STRINGS + "<|AUDIO|>", 2)):
        with pytest.raises(ValueError, match=f"must render each clip's .* once, 1 in all, got {count}"):
            processor.apply_chat_template(CONVERSATION[1:2], template)
    with pytest.raises(ValueError, match=r"must render messages without content, such as message 0, got .*content"):
        processor.apply_chat_template([WITHOUT_TEXT["None"]], "{{ messages[0]['content'] + '<end>' }}")


def test_what_no_message_may_hold(processor):
    for content, message in (
        (3, "a message's content must be a string or a list of parts, got int"),
        ({"type": "text", "text": "a"}, "a message's content must be a string or a list of parts, got dict"),
        (["hi"], "or a path, got a str"),
        ([{"type": "text"}], r"got \['type'\] of type 'text'"),
        ([{"type": "text", "text": 3}], "of type 'text'"),
        ([{"text": "a"}], r"got \['text'\] of type None"),
        ([{"type": "text", "text": f"a{AUDIO_TOKEN}"}], r"got '<\|AUDIO\|>' in a text"),
    ):
        with pytest.raises(ValueError, match=message):
            processor.apply_chat_template([{"role": "user", "content": content}])
    hidden = {"function": {"name": "f", "arguments": {"a": [AUDIO_TOKEN]}}}
    with pytest.raises(ValueError, match=r"got '<\|AUDIO\|>' in a text"):
        processor.apply_chat_template([{"role": "assistant", "tool_calls": [hidden]}])
    for conversation, message in (
        ([], "conversation must be a list of messages, at least one, got none"),
        ("hi", "conversation must be a list of messages, at least one, got str"),
        (CONVERSATION[1], "conversation must be a list of messages, at least one, got dict"),
        ([[], []], "conversation must be a list of messages, at least one, got none in one of several"),
        (["hi"], "a message must be a dict with a role, got str"),
        ([{"content": "hi"}], "a message must be a dict with a role, got dict"),
    ):
        with pytest.raises(ValueError, match=message):
            processor.apply_chat_template(conversation)
