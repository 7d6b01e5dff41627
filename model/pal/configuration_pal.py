"""The parts of an audio LLM: its language model, its encoders, and the way in which each one's audio enters."""

import copy
import inspect
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig

from palkernels.model.causal_lm.config import LalConfig
from palkernels.model.connectors.registry import CONNECTORS
from palkernels.model.encoders.registry import TOWERS

__all__ = ["PalConfig", "attention_by_part", "complete_entry"]

INTEGRATIONS = ("lal", "plits", "flamingo")
PROJECTIONS = ("shared", "per_layer")
REQUIRED_KEYS, OPTIONAL_KEYS = ("type", "connector"), ("config", "integration")
ATTENTION_KEYS = ("", "text_config", "encoders")


def _of_text_config(name: str) -> property:
    """Return an attribute that is the language model's: read and set there, and not saved a second time."""

    def read(config: "PalConfig") -> Any:
        return getattr(config.text_config, name, None)

    def write(config: "PalConfig", value: Any) -> None:
        setattr(config.text_config, name, value)

    return property(read, write)


TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")  # which the language model's config holds


class PalConfig(PreTrainedConfig):  # type: ignore[misc]
    """Configuration of :class:`PalForConditionalGeneration`.

    PAL is encoder-aware: each encoder's audio enters in its own way, by LAL (extra keys and values), by PLITS (tokens
    in place of placeholders) or by Flamingo's gated cross-attention. With ``summary_tokens`` one encoder enters in two
    ways (unified PAL): a few tokens by PLITS, all of them by LAL.

    Args:
        text_config: the language model's config, or a dict with its ``model_type``: any model that ``attach`` takes.
        encoders: one entry per encoder, {"type": "whisper", "clap" or "sslam", "config": the tower's arguments,
            "integration": "lal", "plits" or "flamingo", "connector": {"type": "mlp", "qformer" or "lfst", "config": the
            connector's arguments}}. Both ``config`` may be left out; a connector's widths are filled in. A
            connector that fuses towers says which (``Connector.tower_types``): LFST's entry has "type": ["sslam",
            "clap"] and a list of two configs, or none.
        layers: "all", or the layers that LAL's audio enters; delayed LAL is ``range(4, num_layers)``. With an empty
            list LAL's audio is not there at all. "all" where no audio enters by LAL.
        rope, impl, recompute_audio_kv, audio_kv_dtype: as in :class:`LalConfig`.
        projection: "shared": all layers take the connector's output; "per_layer": each projects it once more, by a
            linear map of its own. The paper does not say which; the default is ours.
        flamingo: arguments of :func:`attach_flamingo` such as {"every": 4}, where audio enters by Flamingo. LAL and
            Flamingo exclude each other.
        summary_tokens: how many tokens per clip enter by PLITS besides LAL, where one encoder's audio enters by LAL;
            0: none. They are means over the connector's output.
        audio_token_id: the token, within the vocabulary, that stands in ``input_ids`` for each PLITS token; None where
            no audio enters by PLITS.
        freeze_encoders: whether the encoders keep their weights in training.
        freeze_ffn: whether the language model's FFNs keep their weights in training.
        encoder_batch: how many windows of clips an encoder takes at once; more are encoded batch after batch, so that
            an hour needs no more memory there than a few minutes.
        pad_token_id, bos_token_id, eos_token_id: those of ``text_config``.
        attn_implementation: how the parts attend, by transformers' names: one for all of them, or a dict with
            "text_config", the language model's, and "encoders", that of encoders and connectors. What is not named is
            as the part's own default is. As in all of transformers it is not saved.

    Raises:
        TypeError, ValueError: the parts do not fit each other; the message is one line.
    """

    model_type = "pal"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig}
    has_no_defaults_at_init: ClassVar[bool] = True  # there is no model without encoders

    text_config: Any = None
    encoders: Any = None
    layers: Any = "all"
    rope: str = "sequence"
    impl: str = "auto"
    recompute_audio_kv: bool = False
    audio_kv_dtype: str | None = None
    projection: str = "shared"
    flamingo: Any = None
    summary_tokens: int = 0
    audio_token_id: int | None = None
    freeze_encoders: bool = True
    freeze_ffn: bool = False
    encoder_batch: int = 16

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.text_config, dict):
            if "model_type" not in self.text_config:
                raise ValueError("text_config must have a model_type, got none")
            self.text_config = AutoConfig.for_model(**self.text_config)
        if not isinstance(self.text_config, PreTrainedConfig):
            raise TypeError(f"text_config must be a config or a dict, got {type(self.text_config).__name__}")
        own = self.text_config._attn_implementation
        kwargs.setdefault("attn_implementation", {"": own, "text_config": own})  # else it would be reset
        if not isinstance(self.encoders, list | tuple) or not self.encoders:
            raise ValueError(f"encoders must be a list of at least one entry, got {self.encoders!r}")
        self.encoders = [complete_entry(entry, self.text_config.hidden_size) for entry in self.encoders]
        layers = self.lal().layers  # sorted, and all of these settings checked
        self.layers = "all" if layers == "all" else list(layers)
        self._check()
        super().__post_init__(**kwargs)

    # Seq2SeqTrainer asks the model's own config how generated texts are padded.
    pad_token_id, bos_token_id, eos_token_id = map(_of_text_config, TOKEN_IDS)

    @property
    def _attn_implementation(self) -> str | None:
        return self._attn_implementation_internal  # type: ignore[no-any-return]

    @_attn_implementation.setter
    def _attn_implementation(self, value: Any) -> None:
        names = attention_by_part(value)
        PreTrainedConfig._attn_implementation.fset(self, value)  # the config's own and the language model's
        if "encoders" in names:
            self._encoders_attn_implementation = names["encoders"]

    @property
    def encoders_attn_implementation(self) -> str | None:
        """How encoders and connectors are asked to attend; None: each as its own default is."""
        return self.__dict__.get("_encoders_attn_implementation")

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().to_dict().items() if name != "_encoders_attn_implementation"}

    def lal(self) -> LalConfig:
        """Return the settings for ``attach``."""
        return LalConfig(self.layers, self.rope, self.impl, self.recompute_audio_kv, self.audio_kv_dtype)

    def lal_layers(self) -> list[int]:
        """Return the layers that LAL's audio enters; none if no encoder's audio enters by LAL."""
        if not self.uses("lal"):
            return []
        return list(range(self.text_config.num_hidden_layers)) if self.layers == "all" else list(self.layers)

    def uses(self, integration: str) -> bool:
        """Return whether some audio enters by "lal", "plits" or "flamingo"."""
        summary = integration == "plits" and self.summary_tokens > 0
        return summary or any(entry["integration"] == integration for entry in self.encoders)

    def _check(self) -> None:
        """Check that the settings fit each other."""
        depth = self.text_config.num_hidden_layers
        if self.layers != "all" and not set(self.layers) <= set(range(depth)):
            raise ValueError(f"layers must be from 0 to {depth - 1}, got {self.layers}")
        if self.projection not in PROJECTIONS:
            raise ValueError(f"projection must be {_names(PROJECTIONS)}, got {self.projection!r}")
        if self.layers != "all" and not self.uses("lal"):
            raise ValueError(f'layers must be "all" where no audio enters by LAL, got {self.layers}')
        if self.projection == "per_layer" and not self.uses("lal"):
            raise ValueError('projection must be "shared" where no audio enters by LAL, got "per_layer"')
        for name in ("freeze_encoders", "freeze_ffn"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be a bool, got {getattr(self, name)!r}")
        if not _is_int(self.encoder_batch) or self.encoder_batch < 1:
            raise ValueError(f"encoder_batch must be an integer, at least 1, got {self.encoder_batch!r}")
        if not _is_int(self.summary_tokens) or self.summary_tokens < 0:
            raise ValueError(f"summary_tokens must be an integer, at least 0, got {self.summary_tokens!r}")
        integrations = [entry["integration"] for entry in self.encoders]
        if self.summary_tokens and integrations != ["lal"]:
            raise ValueError(f'summary_tokens must be 0 unless one encoder enters, by "lal", got {integrations}')
        if {"lal", "flamingo"} <= set(integrations):
            raise ValueError(f"audio must enter by LAL or by Flamingo, besides PLITS, got {integrations}")
        if self.flamingo is not None and not (isinstance(self.flamingo, dict) and self.uses("flamingo")):
            raise ValueError(f"flamingo must be a dict where audio enters by it, else None, got {self.flamingo!r}")
        vocabulary, token = self.text_config.vocab_size, self.audio_token_id
        if token is None and self.uses("plits"):
            raise ValueError("audio_token_id must be given where audio enters by PLITS, got None")
        if token is not None and not (_is_int(token) and 0 <= token < vocabulary):
            raise ValueError(f"audio_token_id must be from 0 to {vocabulary - 1}, got {token!r}")


def attention_by_part(attn_implementation: Any) -> dict[str, Any]:
    """Return what ``attn_implementation`` asks of "", the model itself, of "text_config" and of "encoders", where it
    asks anything.

    Raises:
        ValueError: It is a dict with other keys, or "encoders" is no name.
    """
    if not isinstance(attn_implementation, dict):
        return dict.fromkeys(ATTENTION_KEYS, attn_implementation)
    if not set(attn_implementation) <= set(ATTENTION_KEYS):
        raise ValueError(
            f"attn_implementation must have the keys {_names(ATTENTION_KEYS, 'and')}, got {attn_implementation!r}"
        )
    encoders = attn_implementation.get("encoders")
    if encoders is not None and not isinstance(encoders, str):
        raise ValueError(f'attn_implementation must have a name for "encoders", got {encoders!r}')
    return attn_implementation


def complete_entry(caller_entry: Any, width: int | None = None) -> dict[str, Any]:
    """Return an entry of ``encoders`` with everything that may be left out, after checking it.

    Args:
        caller_entry: The entry as a caller gives it.
        width: Of the language model's states; None: not known.

    Raises:
        ValueError: The entry is malformed.
    """
    if not isinstance(caller_entry, dict):
        raise ValueError(f"an entry of encoders must be a dict, got {type(caller_entry).__name__}")
    missing = [name for name in REQUIRED_KEYS if name not in caller_entry]
    unknown = [name for name in caller_entry if name not in REQUIRED_KEYS + OPTIONAL_KEYS]
    if missing or unknown:
        got = [f"no {name!r}" for name in missing] + [repr(name) for name in unknown]
        raise ValueError(
            f"an entry of encoders must have the keys {_names(REQUIRED_KEYS, 'and')}, and may have "
            f"{_names(OPTIONAL_KEYS, 'and')}, got {', '.join(got)}"
        )
    entry: dict[str, Any] = {"integration": "lal", **copy.deepcopy(caller_entry)}
    several = isinstance(entry["type"], list | tuple)
    types = list(entry["type"]) if several else [entry["type"]]
    if any(tower_type not in TOWERS for tower_type in types) or not types:
        raise ValueError(f"an encoder's type must be {_names(TOWERS)}, got {entry['type']!r}")
    if entry["integration"] not in INTEGRATIONS:
        raise ValueError(f"integration must be {_names(INTEGRATIONS)}, got {entry['integration']!r}")
    connector = entry["connector"]
    if not isinstance(connector, dict) or not set(connector) <= {"type", "config"}:
        raise ValueError(f'connector must be a dict with "type" and "config", got {connector!r}')
    if connector.get("type") not in CONNECTORS:
        raise ValueError(f"a connector's type must be {_names(CONNECTORS)}, got {connector.get('type')!r}")
    fused = CONNECTORS[connector["type"]].tower_types
    if several if fused is None else not several or tuple(types) != fused:
        expected = "one encoder's" if fused is None else f"{list(fused)}"
        raise ValueError(f"the type must be {expected} for the connector {connector['type']!r}, got {entry['type']!r}")
    entry["config"] = entry.get("config") or ([{} for _ in types] if several else {})
    configs = entry["config"] if several else [entry["config"]]
    if (
        not isinstance(configs, list)
        or len(configs) != len(types)
        or any(not isinstance(config, dict) for config in configs)
    ):
        raise ValueError(f"an encoder's config must be a dict, or a list of one per type, got {entry['config']!r}")
    if any("freeze" in config for config in configs):
        raise ValueError(f"an encoder's config must not say freeze, as freeze_encoders does, got {entry['config']!r}")
    settings = connector.get("config") or {}
    known = inspect.signature(CONNECTORS[connector["type"]]).parameters
    if not isinstance(settings, dict) or not set(settings) <= set(known):
        raise ValueError(
            f"config of the connector {connector['type']!r} must have keys of {_names(known)}, got {settings}"
        )
    if width is not None and settings.get("hidden_size", width) != width:
        raise ValueError(f"a connector's hidden_size must be the language model's {width}, got {settings}")
    entry["connector"] = {"type": connector["type"], "config": settings}
    return entry


def _names(names: Any, word: str = "or") -> str:
    """Return names as an error lists them: "a", "b" or "c"."""
    *first, last = (f'"{name}"' for name in names)
    return f"{', '.join(first)} {word} {last}" if first else last


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
