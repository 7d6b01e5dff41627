"""Conversations as texts: what a message may hold, and the forms in which chat templates take it.

A template takes a message's content as a string, or goes through its parts. One that goes through parts may know of
audio and write the audio token itself, with what else belongs to a clip; or it knows text alone, and the token is a
text to it. Which it is, a short conversation tells that is rendered in each form.
"""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from transformers.utils.chat_template_utils import render_jinja_template

from palkernels.errors import one_line
from palkernels.model.pal.rows import Span, is_list

__all__ = ["AUDIO_KEYS", "ChatTemplate", "Dialogue", "conversations_of", "template_source", "template_variables"]

AUDIO_KEYS = ("audio", "path", "url", "audio_url")  # under which a message's part may hold its clip
GENERATION_MARK = re.compile(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}")  # around what the assistant says
PROBE, UNREAD = "Hark", "Hush"  # what a template must render, and must not
# For tokenizers that bring no template of their own.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


class Dialogue(NamedTuple):
    """A conversation that has been read."""

    messages: list[dict[str, Any]]  # content is a string or parts, without clips; None is left out
    clips: list[Any]


class Form(NamedTuple):
    """How a template takes content."""

    strings: bool  # a string as it is; False: as one part
    parts: bool  # a list of parts as it is; False: joined to a string
    audio: bool  # of the parts, those of type "audio", too; False: as a text that is the audio token


def template_source(processor_template: Any, tokenizer: Any, chat_template: str | None, tools: Any) -> str:
    """Return the source of the template to use: one that is given by source or name, the processor's, the tokenizer's.

    Raises:
        ValueError: there are several by name, none of them "default" or of the name that is given.
    """
    names: set[str] = set()
    for templates in (processor_template, tokenizer.chat_template):
        if isinstance(templates, Mapping):
            name = chat_template or ("tool_use" if tools and "tool_use" in templates else "default")
            if name in templates:
                return str(templates[name])
            names |= set(templates)
            if chat_template is None:
                break
        elif chat_template is None and templates is not None:
            return str(templates)
    if names and "{" not in (chat_template or ""):  # no source
        raise ValueError(f"chat_template must be one of {sorted(names)}, got {chat_template!r}")
    return PLAIN_TEMPLATE if chat_template is None else chat_template


def conversations_of(conversation: Any, audio_token: str) -> tuple[list[Dialogue], bool]:
    """Return each conversation's messages and clips, and whether there may be several.

    Args:
        conversation: one list of messages, or several.
        audio_token: must not be in a message's text.

    Raises:
        ValueError: there is no message, or one holds what none may.
    """
    if not is_list(conversation) or not len(conversation):
        got = "none" if is_list(conversation) else type(conversation).__name__
        raise ValueError(f"conversation must be a list of messages, at least one, got {got}")
    several = all(map(is_list, conversation))
    return [_read(messages, audio_token) for messages in (conversation if several else [conversation])], several


def _read(messages: Sequence[Any], audio_token: str) -> Dialogue:
    """Return a conversation without its clips, and these."""
    dialogue = Dialogue([], [])
    if not messages:
        raise ValueError("conversation must be a list of messages, at least one, got none in one of several")
    for message in messages:
        if not isinstance(message, Mapping) or "role" not in message:
            raise ValueError(f"a message must be a dict with a role, got {type(message).__name__}")
        # As transformers does: templates handle a key that is missing, and write "None" for one that is None.
        kept = {key: value for key, value in message.items() if value is not None and key != "content"}
        content = message.get("content")
        if is_list(content):
            kept["content"] = [part for part in map(_part, content) if part is not None]
            dialogue.clips.extend(part.pop("clip") for part in kept["content"] if part["type"] == "audio")
        elif isinstance(content, str):
            kept["content"] = content
        elif content is not None:
            raise ValueError(f"a message's content must be a string or a list of parts, got {type(content).__name__}")
        if _holds(kept, audio_token):
            raise _content_error(f"{audio_token!r} in a text")
        dialogue.messages.append(kept)
    return dialogue


def _part(part: Any) -> dict[str, Any] | None:
    """Return a part as templates take it, an audio part's clip under "clip"; None for a text of None."""
    if not isinstance(part, Mapping):
        raise _content_error(f"a {type(part).__name__}")
    part_type = part.get("type")
    rest = {key: value for key, value in part.items() if value is not None}  # pyarrow fills all keys in
    clip = next((part[key] for key in AUDIO_KEYS if part.get(key) is not None), None)
    if part_type == "audio" and clip is not None:
        without = {key: value for key, value in rest.items() if key not in AUDIO_KEYS}
        return {**without, "audio": "a clip", "clip": clip}  # templates look whether there is one
    if part_type == "text" and isinstance(part.get("text"), str):
        return rest
    if part_type == "text" and "text" in part and part["text"] is None:
        return None
    raise _content_error(f"{sorted(part)} of type {part_type!r}")


def _content_error(got: str) -> ValueError:
    return ValueError(f'content must be "text", or "audio" with an array or a path, got {got}')


def _holds(value: Any, token: str) -> bool:
    """Return whether a string somewhere in a message has the token in it."""
    if isinstance(value, Mapping):
        return any(_holds(item, token) for item in value.values())
    if is_list(value):
        return any(_holds(item, token) for item in value)
    return isinstance(value, str) and token in value


class ChatTemplate:
    """A template, and the form in which it takes messages.

    Args:
        source: the template.
        audio_token: the token that stands for a clip.
        special_tokens: the tokenizer's, by name, which templates may use.
        settings: further variables of the template, and ``tools``, ``documents``, ``continue_final_message``.
    """

    def __init__(self, source: str, audio_token: str, special_tokens: Mapping[str, Any], **settings: Any) -> None:
        self.source = source
        self.audio_token = audio_token
        self.settings = {**special_tokens, **settings}
        self.form = _form(source, audio_token, tuple((k, v) for k, v in special_tokens.items() if isinstance(v, str)))

    def text(self, dialogue: Dialogue, add_generation_prompt: bool = False) -> str:
        """Return a conversation's text, in which each clip's audio token stands once.

        Raises:
            ValueError: the template leaves clips out or repeats them, or needs the content that a message lacks.
        """
        return self._render(dialogue, add_generation_prompt, marks=False)[0]

    def text_and_turns(self, dialogue: Dialogue, add_generation_prompt: bool = False) -> tuple[str, list[Span]]:
        """Return a conversation's text, and where in it the assistant speaks.

        A template says it by its marks, {% generation %} and {% endgeneration %}. Where it has none, an answer is what
        the text of the conversation up to it has more than the text that asks for it.

        Raises:
            ValueError: as ``text``, or without marks the text of a conversation does not begin with that of its
                beginning.
        """
        if GENERATION_MARK.search(self.source):
            return self._render(dialogue, add_generation_prompt, marks=True)
        text = self.text(dialogue, add_generation_prompt)
        turns: list[Span] = []
        for i, message in enumerate(dialogue.messages):
            if message["role"] == "assistant":
                asked = self._beginning(dialogue, i, True)
                answered = self._beginning(dialogue, i + 1, False)
                if not (text.startswith(answered) and answered.startswith(asked)):
                    raise ValueError(
                        "chat_template must mark what the assistant says by {% generation %}, or begin a conversation "
                        f"as it begins without its end, got another text up to message {i}"
                    )
                turns.append((len(asked), len(answered)))
        return text, turns

    def _beginning(self, dialogue: Dialogue, count: int, add_generation_prompt: bool) -> str:
        """Return the text of a conversation's first ``count`` messages."""
        try:
            return self._render(Dialogue(dialogue.messages[:count], []), add_generation_prompt, marks=False)[0]
        except Exception as error:
            raise ValueError(
                "chat_template must mark what the assistant says by {% generation %}, or render the beginning of a "
                f"conversation, got {type(error).__name__} for the first {count} messages: {one_line(error)}"
            ) from error

    def _render(self, dialogue: Dialogue, add_generation_prompt: bool, marks: bool) -> tuple[str, list[Span]]:
        messages = [_shaped(message, self.form, self.audio_token) for message in dialogue.messages]
        try:
            texts, spans = render_jinja_template(
                [messages],
                chat_template=self.source,
                return_assistant_tokens_mask=marks,
                add_generation_prompt=add_generation_prompt,
                **self.settings,
            )
        except Exception as error:
            without = [i for i, message in enumerate(messages) if "content" not in message]
            if without and type(error).__name__ == "UndefinedError":  # jinja2's, which need not be installed
                raise ValueError(
                    f"the template must render messages without content, such as message {without[0]}, "
                    f"got {one_line(error)!r}"
                ) from error
            raise
        text = str(texts[0])
        if dialogue.clips and text.count(self.audio_token) != len(dialogue.clips):
            raise ValueError(
                f"the template must render each clip's {self.audio_token} once, {len(dialogue.clips)} in all, "
                f"got {text.count(self.audio_token)}"
            )
        return text, list(spans[0]) if marks else []


@lru_cache(maxsize=64)
def template_variables(source: str) -> frozenset[str]:
    """Return the names that a template takes from outside."""
    from jinja2 import Environment, meta  # only who uses templates needs it

    plain = GENERATION_MARK.sub("", source)  # a tag of transformers' own
    return frozenset(meta.find_undeclared_variables(Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)))


def _shaped(message: dict[str, Any], form: Form, audio_token: str) -> dict[str, Any]:
    """Return a message in the form that its template takes."""
    content = message.get("content")
    if content is None or (isinstance(content, str) and form.strings):
        return message
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not (form.parts and form.audio):
        parts = [{"type": "text", "text": audio_token} if part["type"] == "audio" else part for part in parts]
    return {**message, "content": parts if form.parts else "".join(part["text"] for part in parts)}


@lru_cache(maxsize=64)
def _form(source: str, audio_token: str, special_tokens: tuple[tuple[str, str], ...]) -> Form:
    """Return the form in which a template renders a text and a clip, of several the one that leaves it most to do.

    One that renders texts in parts and no clip takes parts; one that renders nothing, as those that ask for a system's
    message, strings.
    """

    def render(content: Any) -> str:
        messages = [[{"role": "user", "content": content}]]
        try:
            return str(render_jinja_template(messages, chat_template=source, **dict(special_tokens))[0][0])
        except Exception:
            return ""  # a template may raise anything

    def reads_parts(rendered: str) -> bool:
        return rendered.count(PROBE) == 1 and UNREAD not in rendered

    def goes_through(audio_part: dict[str, str]) -> bool:
        alone, both = render([text]), render([text, audio_part])
        return reads_parts(both) and both.count(audio_token) == alone.count(audio_token) + 1

    text = {"type": "text", "text": PROBE, "unread": UNREAD}  # a template that prints the list prints this, too
    strings = render(PROBE).count(PROBE) == 1
    if goes_through({"type": "audio", "audio": "a clip"}):
        return Form(strings, parts=True, audio=True)
    if not strings and (goes_through({"type": "text", "text": audio_token}) or reads_parts(render([text]))):
        return Form(strings, parts=True, audio=False)
    return Form(strings=True, parts=False, audio=False)
