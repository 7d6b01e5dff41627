"""The subcommands that make an audio LLM and use it, and their options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

# torch and transformers take seconds to import, so each command imports what it needs.
from palkernels.bench.process import clean_up_when_ended, console

__all__ = ["MODEL_COMMANDS"]


def init(
    directory: Annotated[Path, typer.Argument(help="A new or empty directory.", show_default=False)],
    llm: Annotated[
        str | None,
        typer.Option(
            help="Language model: a directory, a .gguf file or a name on the hub.  [default: a tiny random one]"
        ),
    ] = None,
    encoder: Annotated[
        list[str] | None,
        typer.Option(
            help="whisper=DIR, clap=DIR or sslam=DIR, of a checkpoint; the type alone has random weights; may be "
            "repeated.  [default: a tiny random Whisper]"
        ),
    ] = None,
    integration: Annotated[
        list[str] | None,
        typer.Option(help="lal, plits or flamingo, or an encoder's own: TYPE=plits; may be repeated.  [default: lal]"),
    ] = None,
    connector: Annotated[
        list[str] | None,
        typer.Option(
            help="mlp, qformer or lfst, with settings after commas (mlp,stack=4), or an encoder's own: "
            "TYPE=qformer,num_queries=32; may be repeated.  [default: mlp]"
        ),
    ] = None,
    window_seconds: Annotated[
        float | None,
        typer.Option(help="Whisper's window: short clips cost less in a short one.  [default: 30, as it was trained]"),
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Layers that LAL's audio enters: all, 4-, 4-15 or 0,2,4.  [default: all]")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="auto, bf16, fp16 or fp32; auto is the language model's, and fp32 of a .gguf file.")
    ] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of what no checkpoint holds, such as connectors.")] = 0,
) -> None:
    """Build an audio LLM from trained parts, its connectors untrained.

    Without --llm and --encoder it is a small one with random weights, which needs no network: to see how one is saved,
    loaded and asked.
    """
    from palkernels.bench.init import run
    from palkernels.bench.init_options import Options

    clean_up_when_ended()
    settings: dict[str, Any] = {"layers": layers, "dtype": dtype, "seed": seed, "window_seconds": window_seconds}
    settings |= {"integrations": tuple(integration or ()), "connectors": tuple(connector or ())}
    run(Options(directory, llm, tuple(encoder or ()), **settings))


def ask(
    questions: Annotated[
        list[str] | None,
        typer.Argument(help="What to ask, in turn.  [default: lines of the standard input]", show_default=False),
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Directory of a saved model.  [default: the demo's]", show_default=False)
    ] = None,
    serve: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Ask the model of a server (docs/serving.md) instead.", show_default=False),
    ] = None,
    audio: Annotated[
        list[Path] | None,
        typer.Option(help="WAV, FLAC, OGG or MP3 file; may be repeated.  [default: the bundled clip]"),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer.", min=1)] = 64,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda or cuda:INDEX.  [default: auto]", show_default=False)
    ] = None,
) -> None:
    """Ask an audio LLM about a sound, or several in their order.

    Several questions are a conversation, in which each sound is encoded once.
    """
    from palkernels.bench.ask import ask as answer
    from palkernels.bench.clip import bundled_clip

    answer(
        questions or [],
        audio or [bundled_clip()],
        directory=model,
        url=serve,
        max_new_tokens=max_new_tokens,
        device=device,
    )


def evaluate(
    model: Annotated[Path, typer.Option(help="Directory of a saved model.", show_default=False)],
    data: Annotated[
        list[str],
        typer.Option(
            help="File of samples, such as a JSONL, a saved dataset, or a mapping such as "
            """'{path: fleurs, split: test, question: "What is said?"}'; may be repeated.""",
            show_default=False,
        ),
    ],
    metric: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[TASK=]METRIC",
            help="choice, exact, wer, cer, bleu or chrf, or several with commas, for a task or for all; may be "
            "repeated.  [default: by the task's samples]",
        ),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="File for the figures as JSON.")] = None,
    answers: Annotated[Path | None, typer.Option(help="File for every answer, as JSONL.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:INDEX.")] = "auto",
    batch: Annotated[int, typer.Option(help="Samples that are asked at once.", min=1)] = 8,
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer.", min=1)] = 64,
    limit: Annotated[
        int | None, typer.Option(help="The most samples of a file, evenly from all of it.  [default: all]", min=1)
    ] = None,
) -> None:
    """Ask a saved audio LLM questions from files, and compare its answers with those of the files, task by task."""
    from palkernels.bench.evaluate import Options, run

    clean_up_when_ended()
    run(
        Options(model, tuple(data), tuple(metric or ()), json, answers, device, batch, max_new_tokens, limit), console()
    )


def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="What to train.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="As in stages.0.lr=1e-4 and output=DIR.", show_default=False),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the interrupted run in its output.")] = False,
    estimate: Annotated[
        bool, typer.Option("--estimate/--no-estimate", help="Predict memory and time first.", show_default=True)
    ] = True,
) -> None:
    """Train an audio LLM stage by stage, as a recipe says. docs/training.md has every key.

    Ctrl-C stops after the step, with a checkpoint; --resume goes on to the same weights, also after a crash. Several
    GPUs: accelerate launch -m palkernels.bench.cli train RECIPE.yaml.
    """
    from palkernels.bench.train import run

    run(recipe, overrides or [], resume=resume, estimate=estimate)


def demo(
    save: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Save the model to a new directory instead, to serve it.", show_default=False),
    ] = None,
) -> None:
    """Ask a model that comes trained three questions about sounds, and print what it should have said beside what it
    says.

    SmolLM2-135M-Instruct and Whisper tiny.en are taken from the packages of demo-packages.txt.
    """
    from palkernels.bench import demo as trained

    if save is None:
        trained.run(console())
    else:
        clean_up_when_ended()
        trained.save(save, console())


def study(
    out: Annotated[Path, typer.Option(help="Folder of sounds, runs, study.json and study.png.")] = Path("study-out"),
    methods: Annotated[
        str | None,
        typer.Option(help="lal, lal-delayed, plits, plits-pooled, pal-unified, flamingo.  [default: all]"),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Tasks of the sounds, learnt together.  [default: words,languages,voices,timbre,order]"),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Of connectors and of the order of samples.")] = "0,1,2",
    train: Annotated[int | None, typer.Option(help="Questions of each task to learn from.  [default: 240]")] = None,
    test: Annotated[int | None, typer.Option(help="Questions of each task to be asked.  [default: 40]")] = None,
    align: Annotated[
        int | None, typer.Option(help="Samples of the first stage, of the connector alone.  [default: 720]")
    ] = None,
    joint: Annotated[
        int | None, typer.Option(help="Samples of the second stage, of the language model, too.  [default: 480]")
    ] = None,
    every: Annotated[int | None, typer.Option(help="Samples between two tests.  [default: 240]")] = None,
    jobs: Annotated[
        int | None, typer.Option(help="Runs at a time, each on one thread.  [default: one a processor]", min=1)
    ] = None,
    join: Annotated[
        list[Path] | None,
        typer.Option(help="study.json of other seeds or methods, done elsewhere; may be repeated.", show_default=False),
    ] = None,
) -> None:
    """Study how well and how fast each method learns, with real weights and generated sound. Takes hours; goes on where
    it was.

    SmolLM2-135M hears through Whisper tiny.en. Needs the packages of demo-packages.txt and palkernels[train,demo].
    """
    from palkernels.bench.study.settings import parse
    from palkernels.bench.study.study import run

    clean_up_when_ended()
    sizes = {"train": train, "test": test, "align": align, "joint": joint, "every": every}
    print(f"Picture: {run(parse(methods, tasks, seeds, sizes), out, jobs, console(), join or [])}")


def bench_serving(
    server_options: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[-- VLLM_OPTION...]", help="Of each server, as in -- --tensor-parallel-size 2.", show_default=False
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="A preset as in figure1, whose random weights are served by PLITS and by LAL; or the directory of a "
            "saved audio LLM, which may be repeated.  [default: llama-3.2-1b; smollm2-135m on a CPU]"
        ),
    ] = None,
    questions: Annotated[str, typer.Option(help="Numbers of questions about each clip.")] = "1,4,32",
    concurrency: Annotated[str, typer.Option(help="Numbers of requests in flight.")] = "1,8",
    requests: Annotated[int, typer.Option(help="Requests for each load.")] = 64,
    seconds: Annotated[float, typer.Option(help="Length of the clips.")] = 10,
    characters: Annotated[int, typer.Option(help="Of each question; a preset has as many tokens.")] = 64,
    new_tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 32,
    encoder: Annotated[str, typer.Option(help="Whisper's size for a preset, as in figure1.")] = "tiny",
    dtype: Annotated[str, typer.Option(help="auto, bf16, fp16 or fp32; auto is bf16, or fp32 on a CPU.")] = "auto",
    seed: Annotated[
        int | None,
        typer.Option(
            help="Seed of weights and clips.  [default: 0; with --serve another each time, as the server's cache "
            "remembers clips]",
            show_default=False,
        ),
    ] = None,
    start_seconds: Annotated[float, typer.Option(help="The longest that a server may take to start.")] = 1800,
    serve: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Load a server of vLLM's that runs already, instead.", show_default=False),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of serving.json and serving.md.")] = Path("serving-out"),
) -> None:
    """Serve audio LLMs with vLLM, one after the other, and load each with questions about clips: throughput, time to
    the first token and from token to token.

    Needs palkernels[vllm,client,bench]. Questions about one clip come one after the other.
    """
    from palkernels.bench.numbers import parse_counts
    from palkernels.bench.serving.serving import run
    from palkernels.bench.serving.settings import Options, default_model, default_seed

    clean_up_when_ended()
    options = Options(
        models=tuple(model or (() if serve else (default_model(),))),
        questions=parse_counts("--questions", questions),
        concurrency=parse_counts("--concurrency", concurrency),
        requests=requests,
        seconds=seconds,
        characters=characters,
        new_tokens=new_tokens,
        encoder=encoder,
        dtype=dtype,
        seed=default_seed(serve) if seed is None else seed,
        start_seconds=start_seconds,
        out=out,
        serve=tuple(server_options or ()),
        url=serve,
    )
    run(options, console())


MODEL_COMMANDS = (init, train, ask, evaluate, demo, study, bench_serving)
