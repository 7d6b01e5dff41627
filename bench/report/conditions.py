"""The conditions of the run that a result document comes from, in words."""

from __future__ import annotations

import shlex
from typing import Any

__all__ = [
    "caption", "command", "counted", "depth", "experiment", "host", "is_simulated", "listed", "mode_title", "rates",
    "short", "sizes", "title",
]  # fmt: skip

Meta = dict[str, Any]
MODE_TITLES = {"train": "Training step", "infer": "Inference", "prefill": "Prefill"}


def mode_title(mode: str) -> str:
    return MODE_TITLES.get(mode, mode)


def short(device: str | None) -> str:
    """Return a GPU's name without its maker and form: A100."""
    return "" if device is None else device.removeprefix("NVIDIA ").partition("-")[0]


def is_simulated(meta: Meta) -> bool:
    return meta.get("source") == "simulated"


def experiment(meta: Meta) -> str:
    return "simulated costs of LAL and PLITS" if is_simulated(meta) else "Figure 1, measured"


def title(meta: Meta) -> str:
    """Return the model, its depth, the dtype and the machine, in one line."""
    where = (
        f"on {meta['device_name']}"
        if "device_name" in meta
        else "simulated for " + " and ".join(map(short, meta["gpus"]))
    )
    return f"{meta['model']}, {depth(meta)}, {meta['dtype']}, {where}"


def depth(meta: Meta) -> str:
    """Return how many of the model's layers ran: all 30 layers, or 2 of 16 layers."""
    layers, full = meta["layers"], meta["full_layers"]
    return f"all {full} layers" if layers == full else f"{layers} of {full} layers"


def sizes(meta: Meta, mode: str) -> str:
    """Return a mode with its batch and its numbers of tokens."""
    extra = f", {meta['new_tokens']} new tokens" if mode == "infer" else ""
    return f"{mode_title(mode)}: batch {meta[f'{mode}_batch']}, {meta['text_tokens']} text tokens{extra}"


def counted(meta: Meta) -> tuple[str, str]:
    """Return what time and memory count, and what they leave out."""
    if not is_simulated(meta):
        return (
            "connector and LLM: a whole step in training (forward and backward pass, AdamW), prefill and decoding in "
            "inference. The static part is the weights and, in training, gradients and AdamW states",
            "the encoder, which runs once beforehand; the batch's inputs",
        )
    optimizer, eager = meta["optimizer"] != "none", " (captured graphs), or its host's launches (eager)"
    return (
        f"connector and LLM: forward and backward pass{', AdamW' if optimizer else ''} in training, prefill and "
        "decoding in inference. Memory is the peak of all tensors; time is the least that the GPU needs for each "
        f"operation's FLOPs and bytes{eager if host(meta) else ''}",
        f"the encoder{'' if optimizer else '; the optimizer, its states included'}; "
        f"{'' if host(meta) else 'the host and launches; '}what an allocator rounds up or reserves. So times"
        f"{' of captured graphs' if host(meta) else ''} are lower bounds",
    )


def caption(meta: Meta) -> str:
    """Return the lines under a picture."""
    versions = meta["versions"]
    installed = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "palkernels"))
    if is_simulated(meta):
        optimizer = "no optimizer" if meta["optimizer"] == "none" else meta["optimizer"]
        lines = [
            "simulated, not measured: memory is the peak of all tensors, time the least that the GPU needs for each "
            "operation's FLOPs and bytes",
            f"{'; '.join(rates(meta))}; {host(meta) or 'without host'}",
            f"without audio encoder; {optimizer}; connector {meta['connector']}",
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
    """Return the conditions, each with its name, as far as the document has them."""
    does, does_not = counted(meta)
    simulated = is_simulated(meta)
    threads = f", {meta['threads']} CPU threads" if "threads" in meta else ""
    repeats = meta.get("repeats")
    entries = [
        ("Machine", "" if simulated else f"{meta['device_name']} ({meta['device']}){threads}"),
        ("GPUs assumed", "; ".join(rates(meta)) if simulated else ""),
        ("Host assumed", host(meta)),
        (
            "Model",
            f"{meta['model']}, {depth(meta)}" + (f", weights {meta['llm_weights']}" if "llm_weights" in meta else ""),
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
    return [(name, text) for name, text in entries if text]


def command(meta: Meta) -> str:
    """Return the command line that repeats the run."""
    words = ["palkernels", "simulate" if is_simulated(meta) else "figure1"]
    for key, value in meta["options"].items():
        option = f"--{key.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(option if value else f"--no-{option[2:]}")
        elif value is not None:
            words += [option, ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)]
    return shlex.join(words)


def host(meta: Meta) -> str:
    """Return what a simulated GPU's host is assumed to take for a launch; "" where it was left out."""
    seconds = meta.get("host_seconds_per_kernel")
    if seconds is None:
        return ""
    generating, training, ours = (f"{1e6 * seconds[name]:.3g} us" for name in ("generating", "training", "ours"))
    of_ours = f"{ours} one of this library's, not kept from a call before"
    return f"eager: {generating} a kernel in inference, {training} in training, {of_ours}"


def rates(meta: Meta) -> list[str]:
    """Return what each simulated GPU is assumed to reach."""
    return [
        f"{name}: {100 * gpu['share_of_flops']:g} % of {gpu['flops_per_second'] / 1e12:,.0f} TFLOP/s and "
        f"{100 * gpu['share_of_bytes']:g} % of {gpu['bytes_per_second'] / 1e12:.2f} TB/s"
        for name, gpu in meta["gpus"].items()
    ]
