"""Small result documents, as figure1 and simulate write them."""

from typing import Any

GIB = 2**30
GPUS = ("NVIDIA A100-SXM4-80GB", "NVIDIA H200")
VERSIONS = {"palkernels": "0.1.0", "torch": "2.11.0", "transformers": "5.23.0"}


def row(
    method: str, mode: str, count: int, speed: float | None, memory: float, above: float, **more: Any
) -> dict[str, Any]:
    """Memory in GiB; without a speed it did not fit."""
    fits = speed is not None
    return {
        "method": method,
        "mode": mode,
        "audio_tokens": count,
        "text_tokens": 128,
        "batch_size": 2,
        "dtype": "bfloat16",
        "impl": "sdpa",
        "samples_per_second": {"p50": speed, "samples": [speed, speed] if fits else []},
        "peak_memory_bytes": int(memory * GIB) if fits else None,
        "peak_above_static_bytes": int(above * GIB) if fits else None,
        "memory_source": "tracked tensor allocations",
        "source": "measured",
        "status": "ok" if fits else "out of memory",
        **more,
    }


def measured() -> dict[str, Any]:
    """PLITS and LAL; with 1,500 audio tokens PLITS does not fit in training."""
    meta = {
        "device": "cpu",
        "device_name": "Some Processor",
        "gpu": None,
        "threads": 2,
        "versions": VERSIONS,
        "date": "2026-01-02T03:04:05+00:00",
        "model": "llama-3.2-1b",
        "layers": 2,
        "full_layers": 16,
        "llm_weights": "random (seed 0)",
        "encoder": "whisper-tiny",
        "encoder_weights": "random (seed 0)",
        "connector": "MLP, random (seed 0)",
        "audio_file": "bundled clip",
        "optimizer": "fused AdamW",
        "text_tokens": 128,
        "new_tokens": 8,
        "train_batch": 2,
        "infer_batch": 1,
        "dtype": "bfloat16",
        "repeats": {"train": 2, "infer": 5},
        "reductions": "On a CPU the defaults are reduced: 2 of 16 layers.",
        "options": {"audio": "my clip.wav", "model": "llama-3.2-1b", "layers": None, "audio_tokens": [512, 1500]},
    }
    rows = [
        row("plits", "train", 512, 2.0, 4.0, 2.0),
        row("lal", "train", 512, 6.0, 3.0, 0.5),
        row("plits", "train", 1500, None, 0, 0),
        row("lal", "train", 1500, 5.0, 3.5, 0.7),
        row("plits", "infer", 512, 10.0, 1.0, 0.2),
        row("lal", "infer", 512, 15.0, 0.9, 0.1),
    ]
    return {"meta": meta, "rows": rows}


def simulated() -> dict[str, Any]:
    """The whole chain from PLITS to LAL with its levers, on two GPUs, of which the second is twice as fast."""
    gpu = {"flops_per_second": 3e14, "bytes_per_second": 2e12, "share_of_flops": 0.8, "share_of_bytes": 0.9}
    meta = {
        "source": "simulated",
        "gpus": dict.fromkeys(GPUS, gpu),
        "versions": {**VERSIONS, "liger-kernel": None},
        "date": "2026-01-02T03:04:05+00:00",
        "model": "llama-3.2-1b",
        "layers": 16,
        "full_layers": 16,
        "text_tokens": 128,
        "new_tokens": 32,
        "train_batch": 2,
        "infer_batch": 2,
        "dtype": "bfloat16 in training, float16 in inference",
        "optimizer": "none",
        "connector": "MLP from 1280",
        "options": {"model": "llama-3.2-1b", "layers": None, "audio_tokens": [512], "lengths": True, "serving": False},
    }
    train = {"plits": (2.0, 16.0), "plits-tuned": (2.5, 10.0), "lal-eager": (5.0, 6.0), "lal": (10.0, 4.0)}
    levers = {"lal-recompute": (8.0, 3.0), "lal-fused-loss": (None, 0.0)}
    infer = {"plits": (8.0, 4.0), "lal-eager": (16.0, 3.0), "lal": (32.0, 2.0)}
    rows, lengths, exponents = [], [], []
    for factor, device in enumerate(GPUS, start=1):
        for mode, costs in (("train", train | levers), ("infer", infer)):
            for method, (speed, memory) in costs.items():
                more: dict[str, Any] = {"device": device, "source": "simulated"}
                if speed is None:
                    more["status"] = "not installed: liger-kernel"
                else:
                    parts = {"parameters": GIB, "activations": int((memory - 1) * GIB)}
                    more["memory_breakdown"] = parts | ({"K/V cache": 0} if mode == "infer" else {})
                rows.append(row(method, mode, 512, speed and speed * factor, memory, memory - 1, **more))
        for method in ("plits", "lal"):
            for count in (64, 128, 256):
                more = {"device": device, "varies": "audio_tokens", "attention_flops": count * 10**9}
                lengths.append(row(method, "train", count, 1e3 / count, count / 64, count / 128, **more))
            for quantity, power in (("seconds", 1.25), ("peak_above_static_bytes", 1.0), ("attention_flops", None)):
                about = {"varies": "audio_tokens", "mode": "train", "method": method, "device": device}
                exponents.append({**about, "quantity": quantity, "exponent": power})
    serving = [
        {
            "method": method,
            "clips": 1,
            "questions": 8,
            "audio_tokens": 1500,
            "text_tokens": 128,
            "new_tokens": 32,
            "dtype": "float16",
            "first_token_seconds": seconds / factor,
            "tokens_per_second": rate * factor,
            "kv_bytes_per_clip": size * 2**20,
            "status": "ok",
            "device": device,
        }
        for factor, device in enumerate(GPUS, start=1)
        for method, seconds, rate, size in (("plits", 0.2, 1000.0, 400), ("lal", 0.05, 1500.0, 100))
    ]
    return {"meta": meta, "rows": rows, "lengths": lengths, "serving": serving, "exponents": exponents}


def simulated_eager() -> dict[str, Any]:
    """The same with eager mode, in which PLITS is as fast as with captured graphs and everything else half as fast."""
    document = simulated()
    seconds = {"generating": 16.7e-6, "training": 32.7e-6, "ours": 321e-6}
    document["meta"]["host_seconds_per_kernel"] = seconds
    for row in (*document["rows"], *document["lengths"]):
        rate = row["samples_per_second"]["p50"]
        slower = 1 if row["method"] == "plits" else 2
        row |= {"source": "simulated", "eager_samples_per_second": rate and rate / slower}
    for row in document["serving"]:
        slower = 1 if row["method"] == "plits" else 2
        row["eager_first_token_seconds"] = row["first_token_seconds"] * slower
        row["eager_tokens_per_second"] = row["tokens_per_second"] / slower
    return document


def short_clips(*, on_gpu: bool = False) -> list[dict[str, Any]]:
    """PLITS and LAL on clips of 0.8 and 30 s."""
    return [
        {
            "method": method,
            "seconds": seconds,
            "audio_tokens": round(50 * seconds),
            "window_tokens": 1500,
            "text_tokens": 128,
            "batch_size": 4,
            "dtype": "bfloat16",
            "samples_per_second": {"p50": rate, "samples": [rate]},
            "processor_seconds_per_sample": None if on_gpu else spent,
            "status": "ok",
        }
        for method, seconds, rate, spent in (
            ("plits", 0.8, 2.0, 1.0), ("lal", 0.8, 3.0, 0.7), ("plits", 30.0, 0.5, 4.0), ("lal", 30.0, 1.0, 1.0),
        )
    ]  # fmt: skip
