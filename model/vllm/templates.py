"""Chat templates as vLLM uses them, which hands content on in parts where a template goes through parts.

To one that takes strings vLLM would give a clip's token on a line of its own, which no training has seen. So a template
gets a head that brings messages into the form that it takes, as ``PalProcessor.apply_chat_template`` does, and one that
refuses texts with the audio token in them: where a request has no clip, vLLM asks nobody else.
"""

from collections.abc import Mapping
from typing import Any

from transformers import AutoProcessor

from palkernels.model import auto, pal
from palkernels.model.pal.messages import ChatTemplate, template_source

__all__ = ["in_parts", "register_processor"]

# A TemplateError, to which a server answers 400.
CHECK = """
{%- for message in messages -%}
    {%- if message['content'] is string -%}
        {%- set checked = [message['content']] -%}
    {%- else -%}
        {%- set checked = (message['content'] or []) | selectattr('type', 'equalto', 'text') | map(attribute='text') -%}
    {%- endif -%}
    {%- for text in checked if AUDIO_TOKEN in text -%}
        {{- raise_exception("a message's text must not hold " ~ AUDIO_TOKEN ~ ", which stands for a clip") -}}
    {%- endfor -%}
{%- endfor -%}
"""
# Brings a message's parts into one string, or into parts of text alone.
HEAD = """
{%- set shaped = namespace(messages=[], parts=[]) -%}
{%- for message in messages -%}
    {%- if message['content'] is string or not message['content'] -%}
        {%- set shaped.messages = shaped.messages + [message] -%}
    {%- else -%}
        {%- set shaped.parts = [] -%}
        {%- for part in message['content'] -%}
            {%- set text = part['text'] if part['type'] == 'text' else AUDIO_TOKEN -%}
            {%- set shaped.parts = shaped.parts + [PART] -%}
        {%- endfor -%}
        {%- set shaped.messages = shaped.messages + [dict(message, content=CONTENT)] -%}
    {%- endif -%}
{%- endfor -%}
{%- set messages = shaped.messages -%}
"""


def in_parts(source: str, audio_token: str, special_tokens: Mapping[str, Any]) -> str:
    """Return a template that renders as a given one does, but goes through parts of text and of audio.

    It refuses texts with the audio token in them.

    Args:
        source: the template.
        audio_token: what stands for a clip.
        special_tokens: the tokenizer's, by name, which templates may use.
    """
    form = ChatTemplate(source, audio_token, special_tokens).form
    check = CHECK.replace("AUDIO_TOKEN", repr(audio_token))
    if form.parts and form.audio:
        return check + source
    part, content = "text", "shaped.parts | join"
    if form.parts:
        part, content = "{'type': 'text', 'text': text}", "shaped.parts"
    head = HEAD.replace("PART", part).replace("CONTENT", content).replace("AUDIO_TOKEN", repr(audio_token))
    return check + head + source


class PalProcessor(pal.PalProcessor):
    """The processor that vLLM's Auto class finds, by the name that saved models have."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a saved processor, its templates in the form that vLLM needs."""
        processor = super().from_pretrained(*args, **kwargs)
        templates = processor.chat_template or processor.tokenizer.chat_template
        token, special = processor.audio_token, processor.tokenizer.special_tokens_map
        if isinstance(templates, Mapping):
            processor.chat_template = {name: in_parts(str(one), token, special) for name, one in templates.items()}
        else:
            source = template_source(templates, processor.tokenizer, None, None)
            processor.chat_template = in_parts(source, token, special)
        return processor


def register_processor() -> None:
    """Make the processor known to transformers, in the place of the one without vLLM."""
    for config in (auto.PalConfig, pal.PalConfig):  # both are known: AutoProcessor looks for the name alone
        AutoProcessor.register(config, PalProcessor, exist_ok=True)
