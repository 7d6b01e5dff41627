"""What the command `palkernels` can do: its subcommands and their options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

# torch, transformers and matplotlib take seconds to import, so each command imports what it needs.
from palkernels.bench.errors import UserError
from palkernels.bench.model_commands import MODEL_COMMANDS
from palkernels.bench.numbers import parse_counts, parse_seconds
from palkernels.bench.process import clean_up_when_ended
from palkernels.bench.process import console as _console

__all__ = ["app"]

app = typer.Typer(
    name="palkernels",
    help="Measure what LAL saves over PLITS, and see what runs on this machine.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"palkernels {version('palkernels')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


# Copies of what PRESETS and METHODS hold, whose import takes seconds; a test compares them.
MODEL_NAMES = ("llama-3.2-1b", "llama-3.2-3b", "qwen2.5-1.5b", "smollm2-135m")
METHOD_NAMES = (
    *("plits", "plits-tuned", "plits-pooled", "lal-eager", "lal", "pal-multi", "pal-unified", "flamingo"),
    *("lal-recompute", "lal-checkpoint", "lal-fused-loss"),
)
MODELS = f"{', '.join(MODEL_NAMES)}, or a directory with a config.json."
METHODS = f"Any of {', '.join(METHOD_NAMES[:-1])} and {METHOD_NAMES[-1]}, or all."


@app.command()
def figure1(
    audio: Annotated[Path | None, typer.Option(help="WAV, FLAC, OGG or MP3 file.  [default: the bundled clip]")] = None,
    model: Annotated[str | None, typer.Option(help=f"{MODELS}  [default: llama-3.2-1b; smollm2-135m on a CPU]")] = None,
    layers: Annotated[int | None, typer.Option(help="Layers.  [default: all; 2 on a CPU, all of smollm2-135m]")] = None,
    audio_tokens: Annotated[
        str | None, typer.Option(help="Numbers of audio tokens.  [default: 128,512,1500; 128,256,512 on a CPU]")
    ] = None,
    text_tokens: Annotated[int, typer.Option(help="Text tokens of each sample.")] = 128,
    train_batch: Annotated[
        int | None, typer.Option(help="Samples of a training step.  [default: 8; 2 on a CPU]")
    ] = None,
    infer_batch: Annotated[
        int | None, typer.Option(help="Samples generated together.  [default: 12; 2 on a CPU]")
    ] = None,
    new_tokens: Annotated[int | None, typer.Option(help="Tokens to generate.  [default: 32; 8 on a CPU]")] = None,
    methods: Annotated[str | None, typer.Option(help=f"{METHODS}  [default: all; plits,lal on a CPU]")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:INDEX.  [default: auto]")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="auto, bf16, fp16 or fp32; auto is bf16, or fp32 on a CPU without bf16.  [default: auto]"),
    ] = None,
    repeats: Annotated[
        int | None,
        typer.Option(help="Timed passes of each point.  [default: 10; on a CPU at most 2 in training, 5 in inference]"),
    ] = None,
    serving: Annotated[
        bool | None,
        typer.Option(
            "--serving/--no-serving",
            help="Measure questions about shared clips, too.  [default: on a GPU]",
            show_default=False,
        ),
    ] = None,
    clip_seconds: Annotated[
        str | None,
        typer.Option(
            help="Clips that fill a part of the encoder's window, or none.  [default: 0.8,3,30; 0.8,3 on a CPU]"
        ),
    ] = None,
    compiled: Annotated[
        bool,
        typer.Option(
            "--compiled/--no-compiled",
            help="Measure generation of PLITS and LAL with compiled steps, too.",
            show_default=False,
        ),
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for figure1.json, .csv, .png and .html.")] = Path("figure1-out"),
    seed: Annotated[int | None, typer.Option(help="Seed of all random weights and of the text.  [default: 0]")] = None,
    encoder_checkpoint: Annotated[
        Path | None, typer.Option(help="Directory of a Whisper checkpoint.  [default: random weights]")
    ] = None,
    encoder_size: Annotated[str | None, typer.Option(help="Whisper size of a random encoder.  [default: tiny]")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the interrupted run in --out.")] = False,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="Simulate a GPU instead, as the command simulate does.")
    ] = False,
) -> None:
    """Reproduce Figure 1: memory and throughput of PLITS and LAL against audio tokens."""
    counts = None if audio_tokens is None else parse_counts("--audio-tokens", audio_tokens)
    names = None if methods is None else _methods(methods)
    sizes = _left_out_if_none(
        model=model, audio_tokens=counts, methods=names,
        train_batch=train_batch, infer_batch=infer_batch, new_tokens=new_tokens, serving=serving,
    )  # fmt: skip
    clips = None if clip_seconds is None else parse_seconds("--clip-seconds", clip_seconds)
    measuring = _left_out_if_none(
        clip_seconds=clips, audio=audio, device=device, dtype=dtype, repeats=repeats, seed=seed,
        encoder_checkpoint=encoder_checkpoint, encoder_size=encoder_size, compiled=compiled or None,
        resume=resume or None,
    )  # fmt: skip
    if simulate:
        if measuring:
            raise UserError(f"--{next(iter(measuring)).replace('_', '-')} must not be given with --simulate")
        _simulate(**{"audio_tokens": (128, 512, 1500)} | sizes, layers=layers, text_tokens=(text_tokens,), out=out)
        return

    from palkernels.bench.experiments.figure1 import run
    from palkernels.bench.experiments.settings import Options

    clean_up_when_ended()
    picture = run(Options(**sizes, **measuring, layers=layers, text_tokens=text_tokens, out=out), _console())
    print(f"Plot: {picture}")
    print(f"Report: {picture.with_suffix('.html')}")


@app.command()
def simulate(
    model: Annotated[str, typer.Option(help=MODELS)] = "llama-3.2-1b",
    layers: Annotated[int | None, typer.Option(help="Layers of the model.  [default: all]")] = None,
    methods: Annotated[str, typer.Option(help=METHODS)] = "all",
    audio_tokens: Annotated[str, typer.Option(help="Numbers of audio tokens.")] = "512,1500,3000",
    text_tokens: Annotated[str, typer.Option(help="Numbers of text tokens.")] = "128",
    train_batch: Annotated[int, typer.Option(help="Samples of a training step.")] = 8,
    infer_batch: Annotated[int, typer.Option(help="Samples generated together.")] = 12,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 32,
    optimizer: Annotated[str, typer.Option(help="none or adamw.")] = "none",
    lengths: Annotated[bool, typer.Option(help="The cost against audio tokens, text tokens and batch, too.")] = True,
    serving: Annotated[bool, typer.Option(help="Questions about shared clips, too.")] = True,
    measured: Annotated[
        Path | None, typer.Option(help="A figure1.json of one of the GPUs, to compare the predictions with.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for simulate.json, .csv, .png and .html.")] = Path("simulate-out"),
) -> None:
    """Predict Figure 1 at full size on an A100 and an H200: peak memory, and time by a roofline. Needs no GPU.

    Training is in bfloat16, inference in float16.
    """
    counts, texts = parse_counts("--audio-tokens", audio_tokens), parse_counts("--text-tokens", text_tokens)
    _simulate(
        model=model, layers=layers, methods=_methods(methods), audio_tokens=counts, text_tokens=texts,
        train_batch=train_batch, infer_batch=infer_batch, new_tokens=new_tokens, optimizer=optimizer,
        lengths=lengths, serving=serving, measured=measured, out=out,
    )  # fmt: skip


def _simulate(**options: Any) -> None:
    from palkernels.bench.experiments.simulate import Options, run

    clean_up_when_ended()
    print(f"Report: {run(Options(**options), _console())}")


def _methods(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    return METHOD_NAMES if names == ("all",) else names


def _left_out_if_none(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


@app.command()
def doctor(
    tiles: Annotated[
        bool, typer.Option("--tiles", help="Compile every tile of the kernels instead, and show what each uses.")
    ] = False,
    arch: Annotated[int | None, typer.Option(help="80, 90 or 100.  [default: the GPU's; 90 without one]")] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32.  [default: bfloat16]")] = None,
    kernel: Annotated[
        list[str] | None,
        typer.Option(help="forward, decode, query_gradient or key_gradient; may be repeated.  [default: all]"),
    ] = None,
    head_dims: Annotated[
        str | None, typer.Option(help="32, 64, 128 or 256, or several of them, separated by commas.  [default: all]")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="File for the same figures as JSON.")] = None,
) -> None:
    """Show versions, devices, and which implementations run here and why not.

    With --tiles, show registers, shared memory and spills of the Triton kernels; this needs no GPU.
    """
    if not tiles:
        options = {"arch": arch, "dtype": dtype, "kernel": kernel or None, "head-dims": head_dims, "json": json}
        stray = [name for name, value in options.items() if value is not None]
        if stray:
            raise UserError(f"--{stray[0]} must be given with --tiles, got it without --tiles")
        from palkernels.bench.doctor import diagnosis

        print(diagnosis())
        return
    dims = None if head_dims is None else parse_counts("--head-dims", head_dims)

    from palkernels.bench.kernels.tiles import report, select

    clean_up_when_ended()
    report(select(arch, dtype, tuple(kernel) if kernel else None, dims), json, _console())


@app.command()
def microbench(
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="A preset of figure1; may be repeated.  [default: all but smollm2-135m; llama-3.2-1b on a CPU]"
        ),
    ] = None,
    op: Annotated[
        list[str] | None,
        typer.Option(
            help="forward, backward, both, decode, audio_kv, audio_kv_layers or decode_fp8; may be repeated.  "
            "[default: all but decode_fp8]"
        ),
    ] = None,
    audio_tokens: Annotated[str | None, typer.Option(help="[default: 512,1500,3000; 512 on a CPU]")] = None,
    shape: Annotated[
        str | None, typer.Option(help="B,Hq,Hkv,T,N,D instead of a model; decode has T text keys, one query.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, bf16, fp16 or fp32; auto is bf16, or fp32 on a CPU.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:INDEX.")] = "auto",
    peers: Annotated[
        str | None, typer.Option(help="Which ones, separated by commas.  [default: all but gluon]")
    ] = None,
    tile: Annotated[
        list[str] | None,
        typer.Option(
            help="KERNEL=M,N,WARPS,STAGES[,REGISTERS] instead of the shipped one; decoding's warps then share each key."
        ),
    ] = None,
    seconds: Annotated[float | None, typer.Option(help="Time spent on each measurement.  [default: 0.2]")] = None,
    once: Annotated[bool, typer.Option("--once", help="Run one --op at one --shape once, for a profiler.")] = False,
    host: Annotated[
        bool, typer.Option("--host", help="The host's time of a call instead; without a GPU on a stand-in for one.")
    ] = False,
    sweep: Annotated[
        str | None, typer.Option(help="forward, backward or decode: try the tiles near the shipped ones instead.")
    ] = None,
    compile_only: Annotated[
        bool, typer.Option("--compile-only", help="With --sweep: time nothing, which needs no GPU.")
    ] = False,
    json: Annotated[
        Path | None,
        typer.Option(help="File for the results, as pytest-benchmark writes them; other with --host or --sweep."),
    ] = None,
) -> None:
    """Time the kernels beside what else computes the same, and against this machine's limit.

    On a CPU it compares the portable path with PyTorch's attention on concatenated tensors. A result is checked against
    the definition in float64 before it is timed. The exit code is 1 if one was wrong, or broke the device.

    With --host, measure what a call takes of the host's time, before and while the GPU computes. It takes --device,
    where cpu is the stand-in, --seconds, by default 1, and --json.

    With --sweep, compile the tiles that differ little from the shipped one, and time those that fit. It takes --model,
    --audio-tokens, by default 1500, --dtype, --device, --seconds and --json.
    """
    if compile_only and sweep is None:
        raise UserError("--compile-only must be given with --sweep, got it without --sweep")
    if sweep is not None:
        excluded: dict[str, Any] = {
            "op": op, "shape": shape, "peers": peers, "tile": tile, "once": once or None, "host": host or None,
        }  # fmt: skip
        if stray := _left_out_if_none(**excluded):
            raise UserError(f"--sweep must not be given with --{next(iter(stray))}")
        from palkernels.bench.kernels import sweep as sweeping

        clean_up_when_ended()
        counts = None if audio_tokens is None else parse_counts("--audio-tokens", audio_tokens)
        models = tuple(model) if model else None
        chosen = sweeping.Options(sweep, models, counts, dtype, device, seconds, compile_only, json)
        sweeping.run(chosen, _console())
        return
    if host:
        excluded = {
            "model": model, "op": op, "audio-tokens": audio_tokens, "shape": shape, "peers": peers, "tile": tile,
            "dtype": None if dtype == "auto" else dtype, "once": once or None,
        }  # fmt: skip
        if stray := _left_out_if_none(**excluded):
            raise UserError(f"--host must not be given with --{next(iter(stray))}")
        from palkernels.bench.kernels import host as host_time

        clean_up_when_ended()
        host_time.run(host_time.Options(device, seconds, json), _console())
        return

    from palkernels.bench.kernels.cases import OPS
    from palkernels.bench.kernels.microbench import Options, run

    clean_up_when_ended()
    options = Options(
        models=tuple(model) if model else None,
        ops=tuple(op or OPS),
        audio_tokens=None if audio_tokens is None else parse_counts("--audio-tokens", audio_tokens),
        shape=shape,
        dtype=dtype,
        device=device,
        peers=None if peers is None else tuple(name.strip() for name in peers.split(",") if name.strip()),
        tiles=tuple(tile or ()),
        seconds=seconds,
        once=once,
        json=json,
    )
    if not run(options, _console()):
        raise typer.Exit(1)


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="A.json", help="Results of figure1 or simulate.")],
    second: Annotated[Path, typer.Argument(metavar="B.json", help="Others, which may be of the other command.")],
) -> None:
    """Put two results side by side: memory and throughput of both, their ratios, and what differs in the conditions."""
    from palkernels.bench.compare import run

    run(first, second, _console())


for command in MODEL_COMMANDS:
    app.command()(command)
