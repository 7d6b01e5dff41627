"""What callers of a processor may ask for, in the forms in which transformers' own processors take it."""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

__all__ = ["GROUPS", "Options", "is_option", "read_options", "with_rate"]

GROUPS = ("text_kwargs", "audio_kwargs", "common_kwargs", "images_kwargs", "videos_kwargs")
# Options of transformers' processors that have one meaning here, and the values that say it.
FIXED: dict[str, tuple[Any, ...]] = {
    "return_attention_mask": (True, None),
    "images": (None,),
    "videos": (None,),
    "text_pair": (None,),
    "text_target": (None,),
    "text_pair_target": (None,),
    "stride": (0, None),
    "verbose": (True, False, None),
    "load_audio_from_video": (False, None),
    "load_audio_backend": ("auto", None),
    "is_split_into_words": (False, None),
    "sanitize_control_tokens": (False, None),
    "return_token_type_ids": (False, None),
    "return_mm_token_type_ids": (False, None),
    "return_text_replacement_offsets": (False, None),
    "return_overflowing_tokens": (False, None),
    "return_special_tokens_mask": (False, None),
    "return_offsets_mapping": (False, None),
    "return_length": (False, None),
}
# Of clips: features are as long as their encoder wants them, and a clip that it does not hear whole is refused.
FIXED_AUDIO: dict[str, tuple[Any, ...]] = {
    "return_tensors": ("pt",),
    "return_attention_mask": (True, None),
    "padding": (True, "longest", "max_length", None),
    "truncation": (False, None),
    "load_audio_backend": ("auto", None),
}
PADDINGS: dict[bool | str, bool | str]
PADDINGS = {True: True, False: False, "longest": True, "max_length": "max_length", "do_not_pad": False}
TRUNCATIONS = {True: True, False: False, "longest_first": True, "only_first": True, "do_not_truncate": False}
FROM_TOKENIZER = ("padding", "truncation", "max_length", "pad_to_multiple_of")  # may be set where it is loaded
NO_LENGTH = 10**20  # a tokenizer that knows no longest text says a number beyond this


@dataclass(frozen=True)
class Options:
    """How texts become ids and clips samples."""

    padding: bool | str = True
    padding_side: str = "left"
    truncation: bool = False
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    add_special_tokens: bool = True
    return_tensors: str = "pt"
    sampling_rate: int | None = None  # checked where the clips are


def is_option(name: str) -> bool:
    """Return whether a processor knows an option of this name, even if it takes but one value of it."""
    return name in GROUPS or name in FIXED or name in {field.name for field in fields(Options)}


def read_options(caller: Mapping[str, Any], tokenizer: Any, **defaults: Any) -> Options:
    """Return the options that a caller gives, flat or by group, over the tokenizer's and the defaults.

    Args:
        caller: keywords: options, and by the names of ``GROUPS`` dicts of options. None leaves an option as it is.
        tokenizer: options that its ``init_kwargs`` hold come before the defaults.
        defaults: of the method, where they are not the class's.

    Raises:
        TypeError: an option is not known.
        ValueError: an option is given twice, or its value is none that it can have.
    """
    flat = _plain({name: value for name, value in caller.items() if name not in GROUPS})
    groups = {name: _group(name, caller.get(name)) for name in GROUPS}
    common, text, audio = groups["common_kwargs"], groups["text_kwargs"], groups["audio_kwargs"]
    for name in ("images_kwargs", "videos_kwargs"):
        if groups[name]:
            raise ValueError(f"{name} must be empty, as there are texts and clips alone, got {groups[name]!r}")
    for name, group in (("text_kwargs", text), ("audio_kwargs", audio)):
        for option in group:
            if option in flat and (name == "text_kwargs" or option == "sampling_rate"):
                raise ValueError(f"{option} must be given once, got it as a keyword and in {name}")
    if "sampling_rate" in text:
        raise TypeError("text_kwargs must hold options of texts, got 'sampling_rate': it belongs in audio_kwargs")
    given = {**common, **text, **flat}
    if "sampling_rate" in audio:
        given["sampling_rate"] = audio.pop("sampling_rate")
    _check_fixed(audio, FIXED_AUDIO, "audio_kwargs must hold sampling_rate alone")
    known = {field.name for field in fields(Options)}
    _check_fixed({name: value for name, value in given.items() if name not in known}, FIXED, "options must be known")
    set_before = {name: tokenizer.init_kwargs.get(name) for name in FROM_TOKENIZER}
    chosen = {
        **defaults,
        **{name: value for name, value in set_before.items() if value is not None},
        **{name: value for name, value in given.items() if name in known and value is not None},
    }
    options = _check(Options(**chosen), tokenizer)
    asked = given.get("max_length") is not None
    if asked and options.padding != "max_length" and not options.truncation:
        raise ValueError(f'max_length must come with padding="max_length" or truncation=True, got {options.max_length}')
    return options


def with_rate(options: Mapping[str, Any], sampling_rate: int | None) -> Mapping[str, Any]:
    """Return the options with the rate that a keyword of its own gives."""
    if sampling_rate is None:
        return options
    if options.get("sampling_rate") is not None:
        raise ValueError("sampling_rate must be given once, got it as a keyword and in processor_kwargs")
    return {**options, "sampling_rate": sampling_rate}


def _group(name: str, group: Any) -> dict[str, Any]:
    if group is not None and not isinstance(group, Mapping):
        raise TypeError(f"{name} must be a dict of options, got {type(group).__name__}")
    return _plain(group or {})


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options with the strings that transformers' enums stand for."""
    return {name: value.value if isinstance(value, enum.Enum) else value for name, value in options.items()}


def _check_fixed(options: Mapping[str, Any], fixed: Mapping[str, tuple[Any, ...]], what: str) -> None:
    """Refuse options that are not in ``fixed``, and values that are not there."""
    for name, value in options.items():
        if name not in fixed:
            raise TypeError(f"{what}, got {name!r}")
        is_plain = value is None or isinstance(value, bool | int | str)  # an array's == is no bool, its repr no line
        if not is_plain or value not in fixed[name]:
            got = repr(value) if is_plain else type(value).__name__
            raise ValueError(f"{name} must be {_listed(fixed[name])}, got {got}")


def _listed(values: Any) -> str:
    """Return values as an error lists them, without None, which is like leaving the option out."""
    names = [f'"{value}"' if isinstance(value, str) else repr(value) for value in values if value is not None]
    return " or ".join(names) or "None"


def _check(options: Options, tokenizer: Any) -> Options:
    """Return the options in their plainest form, after checking each."""
    if not isinstance(options.padding, bool | str) or options.padding not in PADDINGS:
        raise ValueError(f"padding must be {_listed(PADDINGS)}, got {options.padding!r}")
    if options.padding_side not in ("left", "right"):
        raise ValueError(f'padding_side must be "left" or "right", got {options.padding_side!r}')
    if options.return_tensors not in ("pt", "np"):
        raise ValueError(f'return_tensors must be "pt" or "np", got {options.return_tensors!r}')
    if not isinstance(options.add_special_tokens, bool):
        raise ValueError(f"add_special_tokens must be True or False, got {options.add_special_tokens!r}")
    if not isinstance(options.truncation, bool | str) or options.truncation not in TRUNCATIONS:
        raise ValueError(f"truncation must be {_listed(TRUNCATIONS)}, got {options.truncation!r}")
    for name in ("max_length", "pad_to_multiple_of"):
        value = getattr(options, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
    padding = PADDINGS[options.padding]
    options = replace(options, padding=padding, truncation=TRUNCATIONS[options.truncation])
    if options.max_length is None and (options.truncation or padding == "max_length"):
        if tokenizer.model_max_length >= NO_LENGTH:
            name = "truncation" if options.truncation else 'padding="max_length"'
            raise ValueError(f"max_length must be given with {name}, as the tokenizer knows none, got None")
        options = replace(options, max_length=tokenizer.model_max_length)
    return options
