"""What a result document says of the run it comes from, in words for pictures, tables and reports."""

from __future__ import annotations

import shlex
from typing import Any

from palkernels.bench.methods import METHODS

__all__ = ["caption", "command", "counted", "kind", "label", "listed", "rates", "shape", "short", "title"]

Meta = dict[str, Any]
TITLES = {"train": "Training step", "infer": "Inference", "prefill": "Prefill"}


def label(method: str) -> str:
    return METHODS[method].label if method in METHODS else method


def short(device: str | None) -> str:
    """A GPU's name without its maker and form: A100."""
    return "" if device is None else device.removeprefix("NVIDIA ").partition("-")[0]


def is_simulated(meta: Meta) -> bool:
    return meta.get("source") == "simulated"


def kind(meta: Meta) -> str:
    return "simulated costs of LAL and PLITS" if is_simulated(meta) else "Figure 1, measured"


def title(meta: Meta) -> str:
    where = (
        f"on {meta['device_name']}"
        if "device_name" in meta
        else "simulated for " + " and ".join(map(short, meta["gpus"]))
    )
    return f"{meta['model']}, {_depth(meta)}, {meta['dtype']}, {where}"


def shape(meta: Meta, mode: str) -> str:
    extra = f", {meta['new_tokens']} new tokens" if mode == "infer" else ""
    return f"{TITLES[mode]}: batch {meta[f'{mode}_batch']}, {meta['text_tokens']} text tokens{extra}"


def counted(meta: Meta) -> tuple[str, str]:
    """What time and memory count, and what they do not."""
    if not is_simulated(meta):
        return (
            "connector and LLM: a whole step in training (forward and backward pass, AdamW), prefill and decoding in "
            "inference. The static part is the weights and, in training, gradients and AdamW states",
            "the encoder, which runs once beforehand; the batch's inputs",
        )
    optimizer = meta["optimizer"] != "none"
    return (
        f"connector and LLM: forward and backward pass{', AdamW' if optimizer else ''} in training, prefill and "
        "decoding in inference. Memory is the peak of all tensors; time is the least that the GPU needs for each "
        "operation's FLOPs and bytes",
        f"the encoder{'' if optimizer else '; the optimizer, its states included'}; the host and launches; what an "
        "allocator rounds up or reserves. So times are lower bounds",
    )


def caption(meta: Meta) -> str:
    """The lines under a picture."""
    versions = meta["versions"]
    installed = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "palkernels"))
    if is_simulated(meta):
        optimizer = "no optimizer" if meta["optimizer"] == "none" else meta["optimizer"]
        lines = [
            "simulated, not measured: memory is the peak of all tensors, time the least that the GPU needs for each "
            "operation's FLOPs and bytes",
            f"{'; '.join(rates(meta))}; without audio encoder and host; {optimizer}; connector {meta['connector']}",
        ]
    else:
        repeats = meta["repeats"]
        lines = [
            f"LLM weights {meta['llm_weights']}; audio encoder {meta['encoder']}, weights {meta['encoder_weights']}, "
            f"outside time and memory; connector {meta['connector']}; {meta['optimizer']}",
            f"static part: weights and, in training, gradients and AdamW states; {meta['device']}, {meta['threads']} "
            f"CPU threads; medians of {repeats['train']} training and {repeats['infer']} inference runs (bars: all of "
            "them)",
        ]
    return "\n".join([*lines, f"{installed}; {meta['date'][:10]}"])


def listed(meta: Meta) -> list[tuple[str, str]]:
    """The conditions, each with its name, as far as the document has them."""
    does, does_not = counted(meta)
    simulated = is_simulated(meta)
    threads = f", {meta['threads']} CPU threads" if "threads" in meta else ""
    repeats = meta.get("repeats")
    found = [
        ("Machine", "" if simulated else f"{meta['device_name']} ({meta['device']}){threads}"),
        ("GPUs assumed", "; ".join(rates(meta)) if simulated else ""),
        (
            "Model",
            f"{meta['model']}, {_depth(meta)}" + (f", weights {meta['llm_weights']}" if "llm_weights" in meta else ""),
        ),
        ("Dtype", meta["dtype"]),
        ("Batch sizes", f"{meta['train_batch']} in training, {meta['infer_batch']} in inference"),
        ("Tokens", f"{meta['text_tokens']} text tokens, {meta['new_tokens']} new tokens in inference"),
        ("Encoder", f"{meta['encoder']}, weights {meta['encoder_weights']}" if "encoder" in meta else ""),
        ("Audio", meta.get("audio_file", "")),
        ("Connector", meta["connector"]),
        ("Optimizer", meta["optimizer"]),
        ("Repeats", f"{repeats['train']} training steps, {repeats['infer']} inferences; medians" if repeats else ""),
        ("Interrupted", "the run did not end; points are missing" if meta.get("complete") is False else ""),
        ("Counted", does),
        ("Not counted", does_not),
        ("Reduced", meta.get("reductions", "")),
        ("Versions", ", ".join(f"{name} {version}" for name, version in meta["versions"].items() if version)),
        ("Date", meta["date"].replace("T", " ")),
        ("To repeat it", command(meta)),
    ]
    return [(name, text) for name, text in found if text]


def command(meta: Meta) -> str:
    """The command line that repeats the run."""
    words = ["palkernels", "simulate" if is_simulated(meta) else "figure1"]
    for key, value in meta["options"].items():
        option = f"--{key.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(option if value else f"--no-{option[2:]}")
        elif value is not None:
            words += [option, ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)]
    return shlex.join(words)


def _depth(meta: Meta) -> str:
    layers, full = meta["layers"], meta["full_layers"]
    return f"all {full} layers" if layers == full else f"{layers} of {full} layers"


def rates(meta: Meta) -> list[str]:
    """What each simulated GPU is taken to reach."""
    return [
        f"{name}: {100 * gpu['share_of_flops']:g} % of {gpu['flops_per_second'] / 1e12:,.0f} TFLOP/s and "
        f"{100 * gpu['share_of_bytes']:g} % of {gpu['bytes_per_second'] / 1e12:.2f} TB/s"
        for name, gpu in meta["gpus"].items()
    ]
