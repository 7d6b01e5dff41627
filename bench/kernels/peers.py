"""Peers: what users would call instead of this library for the same results, each with its backend pinned and named.

Attention peers concatenate keys and values inside what is timed, which is their way to take audio; but for the one that
finds them in pages, as a server does, and for this library's second forward kernel.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from palkernels.arguments import Call
from palkernels.attention.launches import empty_outputs
from palkernels.bench.errors import UserError
from palkernels.bench.kernels.cases import EPS, Case
from palkernels.kernels import tiles
from palkernels.kernels.gluon import choice

__all__ = ["OURS", "PEERS", "Peer", "Run", "peers_of"]

Run = Callable[[dict[str, Any]], list[Tensor]]
OURS = "palkernels"
PAGE = 16  # tokens, vLLM's own choice
FLASH_ATTN_2 = "flash_attn.flash_attn_interface"  # flash_attn alone is there with flash-attn 4, too


@dataclass(frozen=True)
class Peer:
    """One implementation. `prepare` makes what is not timed, and returns what is: a function of a case's inputs."""

    key: str
    name: str
    prepare: Callable[[Case], Run]
    has_gradients: bool = True
    is_projection: bool = False  # of audio_kv, not of attention
    module: str | None = None  # that must be installed
    devices: tuple[str, ...] = ("cuda",)
    by_default: bool = True  # or only where it is named

    @property
    def is_installed(self) -> bool:
        if self.module is None:
            return True
        try:
            return importlib.util.find_spec(self.module) is not None
        except ModuleNotFoundError:  # of the package around it
            return False


def _concatenated(inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    key = torch.cat([inputs["audio_key"], inputs["key"]], dim=2)
    return inputs["query"], key, torch.cat([inputs["audio_value"], inputs["value"]], dim=2)


def _sdpa(backend: SDPBackend | None) -> Callable[[Case], Run]:
    def prepare(case: Case) -> Run:
        # Query t sees the audio and the text up to itself: causal, aligned at the lower right.
        bias = causal_lower_right(case.queries, case.audio + case.text) if case.queries > 1 else None
        group = case.heads // case.kv_heads

        def run(inputs: dict[str, Any]) -> list[Tensor]:
            query, key, value = _concatenated(inputs)
            if backend is None:
                return [F.scaled_dot_product_attention(query, key, value, attn_mask=bias, enable_gqa=True)]
            grouped = backend is not SDPBackend.EFFICIENT_ATTENTION
            if not grouped:  # it knows no groups of heads
                key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
            with sdpa_kernel(backend):
                return [F.scaled_dot_product_attention(query, key, value, attn_mask=bias, enable_gqa=grouped)]

        return run

    return prepare


def _two_calls(case: Case) -> Run:
    return lambda inputs: case.ours(inputs, "sdpa")


def _flex(case: Case) -> Run:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    audio = case.audio

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key - audio <= query

    torch._dynamo.reset()  # after some recompilations it would run uncompiled
    attention: Any = torch.compile(flex_attention, dynamic=False)
    mask = None
    if case.queries > 1:
        mask = create_block_mask(visible, None, None, case.queries, audio + case.text, device=str(case.device))

    def run(inputs: dict[str, Any]) -> list[Tensor]:
        return [attention(*_concatenated(inputs), block_mask=mask, enable_gqa=True)]

    return run


def _tokens_first(inputs: dict[str, Any]) -> list[Tensor]:
    return [x.transpose(1, 2) for x in _concatenated(inputs)]


def _flash_attn(module: str) -> Callable[[Case], Run]:
    """Return a peer of flash-attn, whose causal mask is aligned at the lower right."""

    def prepare(case: Case) -> Run:
        attention = importlib.import_module(module).flash_attn_func

        def run(inputs: dict[str, Any]) -> list[Tensor]:
            out = attention(*_tokens_first(inputs), causal=True)
            return [(out[0] if isinstance(out, tuple) else out).transpose(1, 2)]  # some versions add the LSE

        return run

    return prepare


def _flashinfer(case: Case) -> Run:
    flashinfer: Any = importlib.import_module("flashinfer")
    keys = case.audio + case.text
    workspace = torch.empty(256 * 2**20, dtype=torch.uint8, device=case.device)
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD")
    starts = torch.arange(case.batch + 1, dtype=torch.int32, device=case.device)
    wrapper.plan(
        starts * case.queries, starts * keys, case.heads, case.kv_heads, case.head_dim, causal=True,
        q_data_type=case.dtype,
    )  # fmt: skip

    def run(inputs: dict[str, Any]) -> list[Tensor]:
        query, key, value = (x.flatten(0, 1) for x in _tokens_first(inputs))
        return [wrapper.run(query, key, value).view(case.batch, case.queries, *query.shape[1:]).transpose(1, 2)]

    return run


def _in_pages(case: Case) -> Run:
    """Attend over keys and values in pages, audio and text together, as vLLM calls FlashInfer: they are written there
    once, when a set of inputs is first seen, as they are in serving."""
    flashinfer: Any = importlib.import_module("flashinfer")
    keys = case.audio + case.text
    pages = -(-keys // PAGE)  # of each row
    workspace = torch.empty(256 * 2**20, dtype=torch.uint8, device=case.device)
    counts = torch.arange(case.batch + 1, dtype=torch.int32, device=case.device)
    order = torch.randperm(case.batch * pages, generator=torch.Generator().manual_seed(0))  # as a server's are, in time
    order = order.to(case.device, torch.int32)
    last = torch.full((case.batch,), keys - (pages - 1) * PAGE, dtype=torch.int32, device=case.device)
    table, sizes = (counts * pages, order, last), (case.heads, case.kv_heads, case.head_dim, PAGE)
    if case.queries == 1:
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
        wrapper.plan(*table, *sizes, q_data_type=case.dtype, kv_data_type=case.dtype)
    else:
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        wrapper.plan(counts * case.queries, *table, *sizes, causal=True, q_data_type=case.dtype)

    def paged(x: Tensor) -> Tensor:
        store = x.new_zeros(case.batch * pages, PAGE, case.kv_heads, case.head_dim)
        rows = F.pad(x, (0, 0, 0, 0, 0, pages * PAGE - keys))
        store[order.long()] = rows.reshape_as(store)
        return store

    def run(inputs: dict[str, Any]) -> list[Tensor]:
        if "pages" not in inputs:
            _, key, value = _tokens_first(inputs)
            inputs["pages"] = paged(key), paged(value)
        query = inputs["query"].transpose(1, 2).flatten(0, 1)
        out = wrapper.run(query, inputs["pages"])
        return [out.view(case.batch, case.queries, case.heads, case.head_dim).transpose(1, 2)]

    return run


def _gluon(case: Case) -> Run:
    """Attend by this library's Gluon kernel, whether PALKERNELS_GLUON switches it on or not."""
    from palkernels.kernels.gluon.forward import gluon_forward_launch

    def run(inputs: dict[str, Any]) -> list[Tensor]:
        call = Call(**inputs, scale=case.head_dim**-0.5)
        reasons = choice.reasons(call, tiles.capability(case.device))
        if reasons:
            raise UserError("; ".join(reasons))
        out, lse = empty_outputs(call.query)
        gluon_forward_launch(call, out, lse).run()
        return [out]

    return run


def _eager_projection(case: Case) -> Run:
    """Project as a decoder layer does, in plain PyTorch, layer by layer."""

    def rotate(key: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        low, high = key.chunk(2, dim=-1)
        return key * cos + torch.cat([-high, low], dim=-1) * sin

    def run(inputs: dict[str, Any]) -> list[Tensor]:
        keys, values = [], []
        for norm, k_weight, v_weight in zip(*(inputs[x] for x in ("norm_weight", "k_weight", "v_weight")), strict=True):
            normed = F.rms_norm(inputs["states"], (case.width,), norm, EPS)
            key, value = (F.linear(normed, x).view(*normed.shape[:2], case.kv_heads, -1) for x in (k_weight, v_weight))
            keys.append(rotate(key.transpose(1, 2), inputs["cos"], inputs["sin"]))
            values.append(value.transpose(1, 2))
        return [*keys, *values]

    return run


def _layer_modules(case: Case) -> Run:
    """Project by the modules of Llama's decoder layers, layer by layer, as an attached model does where audio_kv may
    not."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    from palkernels.model.causal_lm.layers import project_audio, rotate

    config = LlamaConfig(
        hidden_size=case.width, intermediate_size=1, num_attention_heads=case.heads, num_key_value_heads=case.kv_heads,
        head_dim=case.head_dim, rms_norm_eps=EPS, attn_implementation="eager",
    )  # fmt: skip
    with torch.device("meta"):
        layers = [LlamaDecoderLayer(config, index) for index in range(case.layers)]

    def run(inputs: dict[str, Any]) -> list[Tensor]:
        weights = zip(*(inputs[x] for x in ("norm_weight", "k_weight", "v_weight")), strict=True)
        rotation = inputs["cos"].unsqueeze(0), inputs["sin"].unsqueeze(0)
        keys, values = [], []
        for layer, (norm, k_weight, v_weight) in zip(layers, weights, strict=True):
            attention: Any = layer.self_attn
            modules = (layer.input_layernorm, norm), (attention.k_proj, k_weight), (attention.v_proj, v_weight)
            for module, weight in modules:
                module.weight = torch.nn.Parameter(weight, requires_grad=False)
            key, value = project_audio(layer, inputs["states"])
            keys.append(rotate(attention, key, rotation))
            values.append(value)
        return [*keys, *values]

    return run


PEERS = (
    Peer("sdpa-flash", "cat + SDPA (flash)", _sdpa(SDPBackend.FLASH_ATTENTION)),
    Peer("sdpa-cudnn", "cat + SDPA (cuDNN)", _sdpa(SDPBackend.CUDNN_ATTENTION)),
    Peer("sdpa-efficient", "cat + SDPA (efficient)", _sdpa(SDPBackend.EFFICIENT_ATTENTION)),
    Peer("two-sdpa", "2 x SDPA + merge", _two_calls),
    Peer("flex", "cat + FlexAttention", _flex),
    Peer("flash-attn-2", "cat + flash-attn 2", _flash_attn(FLASH_ATTN_2), module=FLASH_ATTN_2),
    Peer("flash-attn-3", "cat + flash-attn 3", _flash_attn("flash_attn_interface"), module="flash_attn_interface"),
    Peer("flash-attn-4", "cat + flash-attn 4", _flash_attn("flash_attn.cute"), module="flash_attn.cute"),
    Peer("flashinfer", "cat + FlashInfer", _flashinfer, has_gradients=False, module="flashinfer"),
    Peer("flashinfer-paged", "FlashInfer, in pages", _in_pages, has_gradients=False, module="flashinfer"),
    Peer(  # which has never run on a GPU, and may wait there for ever
        "gluon", "the Gluon kernel", _gluon, has_gradients=False, module="triton.experimental.gluon", by_default=False,
    ),
    Peer("sdpa", "cat + SDPA (PyTorch's choice)", _sdpa(None), devices=("cpu",)),
    Peer("eager", "RMSNorm, Linear, RoPE (eager)", _eager_projection, is_projection=True, devices=("cuda", "cpu")),
    Peer("modules", "Llama's modules (transformers)", _layer_modules, is_projection=True, devices=("cuda", "cpu")),
)  # fmt: skip


def peers_of(case: Case, chosen: tuple[str, ...] | None = None) -> list[Peer]:
    """Return the peers of a case's operation on its device, installed or not: those `chosen`, or those by default."""
    return [
        peer
        for peer in PEERS
        if case.is_projection == peer.is_projection
        and not case.in_eight_bits  # which no peer takes with scales
        and case.device.type in peer.devices
        and (peer.by_default if chosen is None else peer.key in chosen)
    ]
