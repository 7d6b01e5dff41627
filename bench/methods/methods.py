"""What is compared: one class per way of putting audio into the language model.

Every method gets the same encoder states, text, labels and weights, and has its own part of the work done by the same
connector. A method runs on a stock Hugging Face model, which `ready` turns into what it needs and back. A new method is
one class here and one entry in METHODS.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel
from torch.nn.functional import adaptive_avg_pool1d, avg_pool1d
from transformers import DynamicCache

from palkernels.bench.instruments.backends import fastest_backend
from palkernels.model import AudioState, LalConfig, attach
from palkernels.model.causal_lm.attached import HANDLE
from palkernels.model.causal_lm.flamingo import attach_flamingo
from palkernels.model.causal_lm.layers import Rotary, project_audio, rotate

__all__ = ["DEFAULT_METHODS", "LEARNING_RATE", "LEVERS", "METHODS", "MODES", "Batch", "Method", "make_adamw"]

MODES = ("train", "infer")
IGNORED = -100  # the label that cross-entropy leaves out
LEARNING_RATE = 1e-5  # small: what is learnt does not matter, only that weights stay finite
POOLED = 4  # audio tokens that are averaged to one
SUMMARY = 32  # tokens that sum up the audio
EVERY = 4  # layers to one of Flamingo's


@dataclass(frozen=True)
class Batch:
    """One batch on its device."""

    states: Tensor  # (A, N, encoder's width): what the encoder gave
    input_ids: Tensor  # (B, T)
    labels: Tensor  # (B, T); IGNORED for the first token, which only PLITS could predict
    index: Tensor | None = None  # (B,) the clip that each text is about; None: A == B, row for row

    @classmethod
    def make(
        cls, clip: Tensor, rows: int, text_tokens: int, vocab_size: int, seed: int, clips: int | None = None
    ) -> Batch:
        """`rows` random texts, and for each a copy of one clip's states (N, width); or fewer `clips`, each shared by as
        many texts."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(vocab_size, (rows, text_tokens), generator=generator).to(clip.device)
        labels = ids.clone()
        labels[:, 0] = IGNORED
        index = None if clips is None else torch.arange(rows, device=clip.device) * clips // rows
        return cls(clip.repeat(rows if clips is None else clips, 1, 1), ids, labels, index)


class Method(ABC):
    """One way of putting audio into the language model."""

    name: ClassVar[str]  # on the command line and in results
    label: ClassVar[str]  # in tables and plots
    about: ClassVar[str]  # one line for readers of a report
    modes: ClassVar[tuple[str, ...]] = MODES

    def why_not(self, device: torch.device) -> str | None:
        """Why it cannot run on a device, in a few words; None: it can."""
        return None

    @abstractmethod
    def ready(self, model: Any, impl: str = "auto") -> AbstractContextManager[str]:
        """Make the model usable with this method; yields the name of the attention that runs. `impl` is that of this
        library's functions."""

    @abstractmethod
    def loss(self, model: Any, connector: nn.Module, batch: Batch) -> Tensor:
        """The training loss; called inside `ready`."""

    @abstractmethod
    def generate(self, model: Any, connector: nn.Module, batch: Batch, new_tokens: int) -> Tensor:
        """Greedy decoding of exactly `new_tokens` tokens, (B, new_tokens); called inside `ready`."""

    def own_parameters(self, model: Any) -> list[nn.Parameter]:
        """What it trains besides model and connector; asked for inside `ready`, which makes it anew."""
        return []

    def in_sequence(self, audio_tokens: int) -> int:
        """Audio tokens that pass whole layers."""
        return 0

    def as_keys(self, audio_tokens: int) -> int:
        """Audio tokens that layers have as keys and values alone."""
        return 0

    def with_logits(self, audio_tokens: int, text_tokens: int) -> int:
        """Tokens of a training row that get logits."""
        return text_tokens

    def cached_tokens(self, clips: int, questions: int, audio_tokens: int, own_tokens: int) -> int:
        """Tokens whose keys and values are kept for questions about clips, each with tokens of its own."""
        return questions * (self.in_sequence(audio_tokens) + own_tokens)


class Plits(Method):
    """The baseline: connector outputs stand before the text and pass every layer. Stock code."""

    name = "plits"
    label = "PLITS"
    about = "audio tokens before the text; stock Hugging Face: SDPA, loss over logits of the whole sequence"

    @contextmanager
    def ready(self, model: Any, impl: str = "auto") -> Iterator[str]:
        yield str(model.config._attn_implementation)

    def loss(self, model: Any, connector: nn.Module, batch: Batch) -> Tensor:
        inputs_embeds = self.embeds(model, connector, batch)
        audio_labels = batch.labels.new_full(
            (len(batch.labels), inputs_embeds.shape[1] - batch.labels.shape[1]), IGNORED
        )
        labels = torch.cat([audio_labels, batch.labels], dim=1)
        loss: Tensor = model(inputs_embeds=inputs_embeds, labels=labels, use_cache=False).loss
        return loss

    def generate(self, model: Any, connector: nn.Module, batch: Batch, new_tokens: int) -> Tensor:
        inputs_embeds = self.embeds(model, connector, batch)
        # With embeddings alone, generate returns the new tokens only.
        tokens: Tensor = model.generate(inputs_embeds=inputs_embeds, **_decoding(inputs_embeds, new_tokens))
        return tokens

    def embeds(self, model: Any, connector: nn.Module, batch: Batch) -> Tensor:
        """(B, audio and text tokens, d)."""
        text = model.get_input_embeddings()(batch.input_ids)
        return torch.cat([_per_text(self.audio(connector, batch.states), batch), text], dim=1)

    def audio(self, connector: nn.Module, states: Tensor) -> Tensor:
        found: Tensor = connector(states)
        return found

    def in_sequence(self, audio_tokens: int) -> int:
        return audio_tokens

    def with_logits(self, audio_tokens: int, text_tokens: int) -> int:
        return text_tokens + self.in_sequence(audio_tokens)


class PlitsTuned(Plits):
    """PLITS at its best: logits of the text alone, and the attention backend that is fastest here, pinned."""

    name = "plits-tuned"
    label = "PLITS, tuned"
    about = "PLITS with logits of the text alone and the fastest SDPA backend pinned"

    @contextmanager
    def ready(self, model: Any, impl: str = "auto") -> Iterator[str]:
        backend = fastest_backend(model)
        with sdpa_kernel(backend):
            yield f"sdpa ({backend.name.removesuffix('_ATTENTION').lower()})"

    def loss(self, model: Any, connector: nn.Module, batch: Batch) -> Tensor:
        inputs_embeds, text_tokens = self.embeds(model, connector, batch), batch.labels.shape[1]
        given = {"labels": batch.labels, "logits_to_keep": text_tokens, "use_cache": False}
        loss: Tensor = model(inputs_embeds=inputs_embeds, **given).loss
        return loss

    def with_logits(self, audio_tokens: int, text_tokens: int) -> int:
        return text_tokens


class PlitsPooled(Plits):
    """PLITS with fewer tokens: the encoder's states are averaged before the connector, as many audio LLMs do."""

    name = "plits-pooled"
    label = f"PLITS, pooled {POOLED}:1"
    about = f"PLITS with {POOLED} audio tokens averaged to one, otherwise stock"

    def audio(self, connector: nn.Module, states: Tensor) -> Tensor:
        pooled = avg_pool1d(states.transpose(1, 2), POOLED, ceil_mode=True, count_include_pad=False)
        return super().audio(connector, pooled.transpose(1, 2))

    def in_sequence(self, audio_tokens: int) -> int:
        return -(-audio_tokens // POOLED)


class _Lal(Method):
    """What enters as keys and values alone does so in every layer."""

    def as_keys(self, audio_tokens: int) -> int:
        return audio_tokens


class Lal(_Lal):
    """Audio as keys and values of the model's own attention, through `palkernels.model.causal_lm.attach`."""

    name = "lal"
    label = "LAL"
    about = "this library: audio as keys and values, no concatenation"

    @contextmanager
    def ready(self, model: Any, impl: str = "auto") -> Iterator[str]:
        handle = attach(model, self.config(impl))
        try:
            yield "+".join(sorted({layer.impl for layer in handle.report().layers}))
        finally:
            handle.detach()

    def cached_tokens(self, clips: int, questions: int, audio_tokens: int, own_tokens: int) -> int:
        return clips * audio_tokens + questions * own_tokens

    def config(self, impl: str) -> LalConfig:
        return LalConfig(layers="all", rope="sequence", impl=impl)

    def loss(self, model: Any, connector: nn.Module, batch: Batch) -> Tensor:
        loss: Tensor = model(**self.inputs(model, connector, batch), labels=batch.labels, use_cache=False).loss
        return loss

    def inputs(self, model: Any, connector: nn.Module, batch: Batch) -> dict[str, Any]:
        # Embedding the text first, as PLITS does, lets the backward pass free the connector's part before the
        # gradients of a tied embedding meet, which can be the peak.
        text = model.get_input_embeddings()(batch.input_ids)
        return {"inputs_embeds": text, "audio": AudioState(connector(batch.states), index=batch.index)}

    def generate(self, model: Any, connector: nn.Module, batch: Batch, new_tokens: int) -> Tensor:
        audio = AudioState(connector(batch.states), index=batch.index)
        tokens: Tensor = model.generate(
            input_ids=batch.input_ids, audio=audio, **_decoding(batch.input_ids, new_tokens)
        )
        return tokens[:, batch.input_ids.shape[1] :]


class LalEager(_Lal):
    """LAL without kernels of its own, as one writes it first: each layer's modules project the audio, its keys and
    values are concatenated with the text's, and stock SDPA attends. A cache that begins with the audio's keys and
    values does just that, so the model itself is stock."""

    name = "lal-eager"
    label = "LAL, eager"
    about = "LAL without this library's kernels: the layers' modules, concatenation, SDPA with a mask"

    @contextmanager
    def ready(self, model: Any, impl: str = "auto") -> Iterator[str]:
        yield f"cat + {model.config._attn_implementation}"

    def loss(self, model: Any, connector: nn.Module, batch: Batch) -> Tensor:
        text = model.get_input_embeddings()(batch.input_ids)
        cache = self.cache(model, connector, batch)
        mask = _ones(len(batch.labels), batch.states.shape[1] + batch.labels.shape[1], batch.labels.device)
        given = {"labels": batch.labels, "attention_mask": mask, "past_key_values": cache, "use_cache": True}
        loss: Tensor = model(inputs_embeds=text, **given).loss
        return loss

    def generate(self, model: Any, connector: nn.Module, batch: Batch, new_tokens: int) -> Tensor:
        # Ids for what is in the cache: generate counts by them which tokens are new, and reads no more of them.
        before = batch.input_ids.new_zeros(len(batch.input_ids), batch.states.shape[1])
        ids = torch.cat([before, batch.input_ids], dim=1)
        cache = self.cache(model, connector, batch)
        tokens: Tensor = model.generate(input_ids=ids, past_key_values=cache, **_decoding(ids, new_tokens))
        return tokens[:, ids.shape[1] :]

    def cached_tokens(self, clips: int, questions: int, audio_tokens: int, own_tokens: int) -> int:
        return questions * (audio_tokens + own_tokens)

    def cache(self, model: Any, connector: nn.Module, batch: Batch) -> DynamicCache:
        """Holds the audio's keys, at positions before the text's, and values."""
        decoder = model.get_decoder()
        states = connector(batch.states)
        rotary = Rotary(decoder.rotary_emb, decoder.config, len(decoder.layers))
        positions = torch.arange(states.shape[1], device=states.device).unsqueeze(0)
        cache = DynamicCache(config=model.config)
        for index, layer in enumerate(decoder.layers):
            key, value = project_audio(layer, states)
            key = rotate(layer.self_attn, key, rotary.of_layer(index, states, positions))
            cache.update(_per_text(key, batch), _per_text(value, batch), index)
        return cache


class PalMulti(Lal):
    """PAL with two encoders: the first half of the audio tokens stands before the text (as Whisper's would), the second
    enters as keys and values (as SSLAM's)."""

    name = "pal-multi"
    label = "PAL, two encoders"
    about = "half of the audio tokens by PLITS (Whisper), half by LAL (SSLAM); logits of the text alone"

    def in_sequence(self, audio_tokens: int) -> int:
        return audio_tokens // 2

    def as_keys(self, audio_tokens: int) -> int:
        return audio_tokens - audio_tokens // 2

    def parts(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """What enters by PLITS and what by LAL, of the connector's output (A, N, d)."""
        count = self.in_sequence(states.shape[1])
        return states[:, :count], states[:, count:]

    def loss(self, model: Any, connector: nn.Module, batch: Batch) -> Tensor:
        given = {"labels": batch.labels, "logits_to_keep": batch.labels.shape[1], "use_cache": False}
        loss: Tensor = model(**self.inputs(model, connector, batch), **given).loss
        return loss

    def inputs(self, model: Any, connector: nn.Module, batch: Batch) -> dict[str, Any]:
        text = model.get_input_embeddings()(batch.input_ids)
        before, keys = self.parts(connector(batch.states))
        inputs_embeds = torch.cat([_per_text(before, batch), text], dim=1)
        return {"inputs_embeds": inputs_embeds, "audio": AudioState(keys, index=batch.index)}

    def generate(self, model: Any, connector: nn.Module, batch: Batch, new_tokens: int) -> Tensor:
        inputs = self.inputs(model, connector, batch)
        tokens: Tensor = model.generate(**inputs, **_decoding(inputs["inputs_embeds"], new_tokens))
        return tokens


class PalUnified(PalMulti):
    """PAL with one encoder: a few tokens that sum up the audio stand before the text, all of it enters as keys and
    values."""

    name = "pal-unified"
    label = "PAL, unified"
    about = f"at most {SUMMARY} summary tokens by PLITS, the full sequence by LAL; logits of the text alone"

    def in_sequence(self, audio_tokens: int) -> int:
        return min(SUMMARY, audio_tokens)

    def as_keys(self, audio_tokens: int) -> int:
        return audio_tokens

    def parts(self, states: Tensor) -> tuple[Tensor, Tensor]:
        summary = adaptive_avg_pool1d(states.transpose(1, 2), self.in_sequence(states.shape[1]))
        return summary.transpose(1, 2), states


class Flamingo(Lal):
    """The comparison: gated cross-attention and an FFN of its own before every fourth layer (once in a model with
    fewer), new parameters that train along."""

    name = "flamingo"
    label = "Flamingo"
    about = (
        f"gated cross-attention to the audio and an FFN, new weights, before every {EVERY}th layer (of fewer, the last)"
    )

    @contextmanager
    def ready(self, model: Any, impl: str = "auto") -> Iterator[str]:
        handle = attach_flamingo(model, every=min(EVERY, model.config.num_hidden_layers), impl=impl)
        try:
            yield impl if impl != "auto" else "triton" if model.device.type == "cuda" else "sdpa"
        finally:
            handle.detach()

    def own_parameters(self, model: Any) -> list[nn.Parameter]:
        return list(getattr(model, HANDLE).layers.parameters())

    def as_keys(self, audio_tokens: int) -> int:
        return 0  # the model's own layers see no audio


class LalRecompute(Lal):
    """Training without keeping the audio's keys and values: they are projected again in the backward pass."""

    name = "lal-recompute"
    label = "LAL, recomputed K/V"
    about = "lal with recompute_audio_kv=True"
    modes = ("train",)

    def config(self, impl: str) -> LalConfig:
        return LalConfig(layers="all", rope="sequence", impl=impl, recompute_audio_kv=True)


class LalCheckpoint(Lal):
    """Training with gradient checkpointing: each layer keeps its input alone and runs again in the backward pass."""

    name = "lal-checkpoint"
    label = "LAL, checkpointed"
    about = "lal with gradient checkpointing (non-reentrant)"
    modes = ("train",)

    @contextmanager
    def ready(self, model: Any, impl: str = "auto") -> Iterator[str]:
        with super().ready(model, impl) as name:
            was_training = model.training
            model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            try:
                yield name
            finally:
                model.gradient_checkpointing_disable()
                model.train(was_training)


class LalFusedLoss(Lal):
    """Training with Liger-Kernel's loss, which makes logits and their gradients for a few tokens at a time."""

    name = "lal-fused-loss"
    label = "LAL, fused loss"
    about = "lal with Liger-Kernel's fused linear cross-entropy"
    modes = ("train",)

    def why_not(self, device: torch.device) -> str | None:
        if find_spec("liger_kernel") is None:
            return "liger-kernel is not installed"
        return None if device.type == "cuda" else "needs a GPU"

    @contextmanager
    def ready(self, model: Any, impl: str = "auto") -> Iterator[str]:
        import liger_kernel.transformers.functional  # noqa: F401 (outside of what is measured)

        with super().ready(model, impl) as name:
            yield name

    def loss(self, model: Any, connector: nn.Module, batch: Batch) -> Tensor:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        # The stock forward with logits of no token, so that audio takes its usual way; what it gives before them is
        # the last norm's output.
        found: list[Tensor] = []
        hook = model.get_decoder().register_forward_hook(lambda module, args, out: found.append(out[0]))
        try:
            model(**self.inputs(model, connector, batch), use_cache=False, logits_to_keep=slice(0, 0))
        finally:
            hook.remove()
        hidden = found[0][:, :-1].reshape(-1, found[0].shape[-1])
        loss: Tensor = liger_fused_linear_cross_entropy(hidden, model.lm_head.weight, batch.labels[:, 1:].reshape(-1))
        return loss


def make_adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW with its states already there, as in every step of a training but the first."""
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer


_ALL = (
    *(Plits(), PlitsTuned(), PlitsPooled(), LalEager(), Lal(), PalMulti(), PalUnified(), Flamingo()),
    *(LalRecompute(), LalCheckpoint(), LalFusedLoss()),
)
METHODS: dict[str, Method] = {method.name: method for method in _ALL}
DEFAULT_METHODS = ("plits", "plits-tuned", "plits-pooled", "lal-eager", "lal", "pal-multi", "pal-unified", "flamingo")
LEVERS = ("lal-recompute", "lal-checkpoint", "lal-fused-loss")  # of training memory, against "lal"


def _per_text(tensor: Tensor, batch: Batch) -> Tensor:
    """From a row for each clip to one for each text."""
    return tensor if batch.index is None else tensor.index_select(0, batch.index)


def _ones(rows: int, tokens: int, device: torch.device) -> Tensor:
    return torch.ones(rows, tokens, dtype=torch.long, device=device)


def _decoding(prompt: Tensor, new_tokens: int) -> dict[str, Any]:
    # pad_token_id is never used, and silences a warning about its absence. Without a mask, generate would take the
    # random text's tokens of that number for padding.
    mask = _ones(prompt.shape[0], prompt.shape[1], prompt.device)
    settings = {"max_new_tokens": new_tokens, "do_sample": False, "num_beams": 1, "pad_token_id": 0}
    return {"attention_mask": mask, **settings}
