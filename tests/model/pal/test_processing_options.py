"""A processor's options: each in every form in which transformers' processors take it, and none passed over."""

import numpy
import pytest
import torch
from support.audio_llm import AUDIO_TOKEN, TOKENIZER, entry, tone
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer
from transformers.utils import PaddingStrategy

from palkernels.model import PalProcessor, byte_tokenizer

CHAT = [{"role": "user", "content": [{"type": "audio", "audio": tone()}, {"type": "text", "text": "what?"}]}]
SHORT = [{"role": "user", "content": "hi"}]
TEXTS = [f"user: {AUDIO_TOKEN}what?\n", "user: hi\n"]
EXPANDED = [text.replace(AUDIO_TOKEN, AUDIO_TOKEN * 5) for text in TEXTS]  # what the clip of 0.1 s has of Whisper's
BATCH = {"tokenize": True, "return_dict": True}


@pytest.fixture(scope="module")
def both():
    """The processor of a model with Whisper by PLITS and SSLAM by LAL."""
    return PalProcessor(TOKENIZER, [entry("whisper", "plits"), entry("sslam")])


def ends_of_texts():
    """A tokenizer that begins and ends every text."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    ends = [("<s>", tokenizer.bos_token_id), (tokenizer.eos_token, tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A <|end|>", special_tokens=ends)
    return tokenizer


PADDED = {
    "longest": {"padding": "longest"},
    "right": {"padding_side": "right"},
    "multiple": {"pad_to_multiple_of": 16},
    "max_length": {"padding": "max_length", "max_length": 64},
    "enum": {"padding": PaddingStrategy.MAX_LENGTH, "max_length": 40, "padding_side": "right"},
    "truncation": {"padding": "max_length", "max_length": 40, "truncation": True},
    "None": {"padding": None, "max_length": None, "truncation": None, "padding_side": None},
}


@pytest.mark.parametrize("name", PADDED)
def test_padding_is_the_tokenizers_own(both, name):
    options = PADDED[name]
    own = {"padding_side": "left", "padding": True} | {k: v for k, v in options.items() if v is not None}
    want = TOKENIZER(EXPANDED, return_tensors="pt", **own)
    ways = {
        "call": both(TEXTS, tone(), 16_000, **options),
        "text_kwargs": both(text=TEXTS, audio=tone(), text_kwargs=options, audio_kwargs={"sampling_rate": 16_000}),
        "common": both(TEXTS, tone(), common_kwargs={**options, "return_tensors": "pt", "sampling_rate": 16_000}),
        "chat": both.apply_chat_template([CHAT, SHORT], **BATCH, **options, sampling_rate=16_000),
        "processor_kwargs": both.apply_chat_template(
            [CHAT, SHORT], **BATCH, processor_kwargs={**options, "sampling_rate": 16_000}
        ),
        "groups": both.apply_chat_template(
            [CHAT, SHORT],
            **BATCH,
            return_tensors="pt",
            processor_kwargs={"text_kwargs": options, "audio_kwargs": {"sampling_rate": 16_000, "padding": True}},
        ),
    }
    for way, got in ways.items():
        for key in ("input_ids", "attention_mask"):
            assert torch.equal(got[key], want[key]), (way, key)
        assert got["insert_at"].tolist() == [[6], [0]], way  # in tokens without padding


def test_what_stands_nearest_counts(both):
    got = both("abc", text_kwargs={"padding_side": "right"}, common_kwargs={"pad_to_multiple_of": 4})
    assert got["attention_mask"].tolist() == [[1, 1, 1, 0]]
    got = both("abc", pad_to_multiple_of=5, common_kwargs={"pad_to_multiple_of": 4})
    assert got["attention_mask"].tolist() == [[0, 0, 1, 1, 1]]


def test_options_of_the_tokenizer(both, tmp_path):
    """A tokenizer may be loaded with options of its own, which a call overrides."""
    TOKENIZER.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, padding="max_length", max_length=12)
    processor = PalProcessor(tokenizer, both.encoders)
    assert processor("abc")["input_ids"].shape == (1, 12)
    assert processor("abc", max_length=7)["input_ids"].shape == (1, 7)
    assert processor("abc", padding=True)["input_ids"].shape == (1, 3)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("text", ["abcdefgh", "<s>abcdefgh", "abc"])
def test_truncation_of_text_is_the_tokenizers_own(both, side, text):
    tokenizer = ends_of_texts()
    tokenizer.truncation_side = side
    processor = PalProcessor(tokenizer, both.encoders)
    begun = text.startswith("<s>")  # by us the text gets neither a second BOS token nor an end
    want = tokenizer(text, truncation=True, max_length=6, add_special_tokens=not begun)["input_ids"]
    got = processor(text, truncation=True, max_length=6)
    assert got["input_ids"].tolist() == [want]


def test_truncation_never_cuts_a_clip(both):
    tokenizer = ends_of_texts()
    processor = PalProcessor(tokenizer, both.encoders)
    full = f"<s>ab{AUDIO_TOKEN * 5}cdef<|end|>"  # 13 tokens
    cases = [("right", 10, f"<s>ab{AUDIO_TOKEN * 5}c<|end|>", 3), ("right", 9, f"<s>ab{AUDIO_TOKEN * 5}<|end|>", 3)]
    cases += [("left", 11, f"<s>{AUDIO_TOKEN * 5}cdef<|end|>", 1), ("left", 13, full, 3)]
    for side, length, want, place in cases:
        tokenizer.truncation_side = side
        got = processor(f"ab{AUDIO_TOKEN}cdef", tone(), 16_000, truncation="longest_first", max_length=length)
        assert tokenizer.decode(got["input_ids"][0]) == want
        assert got["insert_at"].tolist() == [[place]]
    for side, length in (("right", 8), ("left", 10), ("right", 1)):
        tokenizer.truncation_side = side
        with pytest.raises(ValueError, match="truncation must cut text alone, never a clip, got max_length") as caught:
            processor(f"ab{AUDIO_TOKEN}cdef", tone(), 16_000, truncation=True, max_length=length)
        assert "for text 0 of 13 tokens, with clips at 3 to 8" in str(caught.value)
    lal = PalProcessor(tokenizer, [entry("sslam")])  # its clip has no token of its own, and a place
    tokenizer.truncation_side = "left"
    got = lal(f"ab{AUDIO_TOKEN}cdef", tone(), 16_000, truncation=True, max_length=7)
    assert (tokenizer.decode(got["input_ids"][0]), got["insert_at"].tolist()) == ("<s>bcdef<|end|>", [[2]])
    with pytest.raises(ValueError, match="with clips at 3 to 3"):
        lal(f"ab{AUDIO_TOKEN}cdef", tone(), 16_000, truncation=True, max_length=5)
    with pytest.raises(ValueError, match="with clips at none"):
        lal("abc", truncation=True, max_length=1)  # less than what the tokenizer puts around a text


REFUSED = [
    (TypeError, "options must be known, got 'paddings'", {"paddings": True}),
    (TypeError, "options must be known, got 'max_lenght'", {"text_kwargs": {"max_lenght": 3}}),
    (TypeError, "options must be known, got 'audios'", {"audios": 1}),
    (TypeError, "options must be known, got 'fps'", {"common_kwargs": {"fps": 3}}),
    (TypeError, "text_kwargs must hold options of texts, got 'sampling_rate'", {"text_kwargs": {"sampling_rate": 9}}),
    (TypeError, "audio_kwargs must hold sampling_rate alone, got 'max_length'", {"audio_kwargs": {"max_length": 9}}),
    (TypeError, "text_kwargs must be a dict of options, got list", {"text_kwargs": [1]}),
    (ValueError, "truncation must be False, got True", {"audio_kwargs": {"truncation": True}}),
    (ValueError, "images_kwargs must be empty", {"images_kwargs": {"size": 3}}),
    (ValueError, "images must be None, got Tensor", {"images": torch.zeros(2)}),
    (ValueError, "videos must be None, got 'a.mp4'", {"videos": "a.mp4"}),
    (ValueError, 'return_tensors must be "pt" or "np", got .tf.', {"return_tensors": "tf"}),
    (ValueError, "add_special_tokens must be True or False, got 'no'", {"add_special_tokens": "no"}),
    (ValueError, "return_offsets_mapping must be False, got True", {"return_offsets_mapping": True}),
    (ValueError, "return_attention_mask must be True, got False", {"return_attention_mask": False}),
    (ValueError, "padding must be given once", {"padding": True, "text_kwargs": {"padding": True}}),
    (ValueError, "sampling_rate must be given once", {"sampling_rate": 1, "audio_kwargs": {"sampling_rate": 1}}),
    (ValueError, 'padding must be True or False or "longest"', {"padding": "most"}),
    (ValueError, 'padding_side must be "left" or "right"', {"padding_side": "top"}),
    (ValueError, "truncation must be True or False", {"truncation": "only_second"}),
    (ValueError, "max_length must be a positive integer, got 0", {"max_length": 0}),
    (ValueError, "pad_to_multiple_of must be a positive integer, got True", {"pad_to_multiple_of": True}),
    (ValueError, 'max_length must come with padding="max_length" or truncation=True, got 9', {"max_length": 9}),
    (ValueError, "max_length must be given with truncation", {"truncation": True}),
    (ValueError, 'max_length must be given with padding="max_length"', {"padding": "max_length"}),
    (
        ValueError,
        "max_length must be at least 8, the tokens of the longest",
        {"padding": "max_length", "max_length": 7},
    ),
    (ValueError, "padding must be True for texts of different lengths", {"padding": False}),
]


@pytest.mark.parametrize(("error", "message", "options"), REFUSED, ids=[message for _, message, _ in REFUSED])
def test_refused_by_name(both, error, message, options):
    with pytest.raises(error, match=message) as caught:
        both(["abcdefgh", "abc"], **options)
    assert "\n" not in str(caught.value)
    chats = [[{"role": "user", "content": text}] for text in ("abcdefgh", "abc")]
    with pytest.raises(error, match=message):
        both.apply_chat_template(chats, "{{ messages[0]['content'] }}", **BATCH, processor_kwargs=options)


def test_an_unknown_keyword_of_a_template_call_is_refused(both):
    """A keyword is a variable that the template names, or an option."""
    template = "{{ messages[0]['content'] }}{% if polite is defined and polite %} please{% endif %}"
    assert both.apply_chat_template(SHORT, template, polite=True) == "hi please"
    with pytest.raises(TypeError, match="a keyword must be an option, or a variable of the chat template, got 'polit'"):
        both.apply_chat_template(SHORT, template, polit=True)
    with pytest.raises(TypeError, match="got 'enable_thinking'"):
        both.apply_chat_template(SHORT, enable_thinking=False)
    with pytest.raises(ValueError, match="padding must be given once, got it as a keyword and in processor_kwargs"):
        both.apply_chat_template(SHORT, **BATCH, padding=True, processor_kwargs={"padding": True})
    named = "{{ padding }}{{ messages[0]['content'] }}"  # a template's own variable comes first, as in transformers
    assert both.apply_chat_template(SHORT, named, padding="wide ") == "wide hi"


def test_special_tokens_of_a_template_call(both):
    processor = PalProcessor(ends_of_texts(), both.encoders, chat_template="{{ messages[0]['content'] }}")
    ids = processor.apply_chat_template(SHORT, tokenize=True, return_dict=False)
    assert processor.tokenizer.decode(ids[0]) == "hi"
    more = processor.apply_chat_template(SHORT, tokenize=True, processor_kwargs={"add_special_tokens": True})
    assert processor.tokenizer.decode(more["input_ids"][0]) == "<s>hi<|end|>"


def test_arrays_instead_of_tensors(both):
    tensors = both.apply_chat_template(CHAT, **BATCH, sampling_rate=16_000)
    for more in ({"return_tensors": "np"}, {"processor_kwargs": {"common_kwargs": {"return_tensors": "np"}}}):
        arrays = both.apply_chat_template(CHAT, **BATCH, sampling_rate=16_000, **more)
        assert set(arrays) == set(tensors)
        for name, value in arrays.items():
            pairs = zip(value, tensors[name], strict=True) if name == "input_features" else [(value, tensors[name])]
            for array, tensor in pairs:
                assert isinstance(array, numpy.ndarray), name
                assert numpy.array_equal(array, tensor.numpy()), name
