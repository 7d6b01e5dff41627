"""The methods that an attached model has in place of its own: ``forward``, ``generate`` and what prepares a step."""

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from palkernels.model.causal_lm.attached import HANDLE, Attached
from palkernels.model.causal_lm.caches import cache_of, prepared_whole
from palkernels.model.causal_lm.encoded import EncodedAudio
from palkernels.model.causal_lm.generation import check_unchanged, current, generate
from palkernels.model.causal_lm.memory import cache_after, memory_of, recalled, remember, text_rows
from palkernels.model.causal_lm.request import REQUEST_KEYWORD, Carried, Request
from palkernels.model.causal_lm.state import AudioState

# Keywords of audio models, and near misses of ours; stock models pass over what they do not know.
FOREIGN_KEYWORDS = ("audio", "input_features", "input_values", "insert_at")
OURS = (AudioState, EncodedAudio, Request, Carried)
DEPTH = 6  # wrappers around wrappers, in which ours is looked for


def patch(handle: Attached) -> None:
    """Give the handle's model its methods that take audio: the last step of attaching."""
    model = handle.model
    handle.replaced = {method.name: model.__dict__.get(method.name) for method in METHODS}
    object.__setattr__(model, HANDLE, handle)
    for method in METHODS:
        object.__setattr__(model, method.name, method(handle))
    handle.guard = model.register_forward_pre_hook(Guard(handle), with_kwargs=True, prepend=True)


def unpatch(handle: Attached) -> None:
    """Put the model's own methods back: the last step of detaching."""
    model = handle.model
    if handle.guard is not None:
        handle.guard.remove()
    for name, replaced in handle.replaced.items():
        method = model.__dict__.get(name)
        if not isinstance(method, PatchedMethod) or method.handle is not handle:
            continue  # somebody has wrapped ours, which only passes on what it is given from now on
        if replaced is None:
            object.__delattr__(model, name)
        else:
            object.__setattr__(model, name, replaced)
    object.__delattr__(model, HANDLE)


class Guard:
    """A hook on the model that sees whether ``forward`` is still the one that attach made.

    Others replace it after attach, as Liger does when the Trainer applies it. Theirs then becomes the stock forward,
    and ours takes its place again.
    """

    def __init__(self, handle: Attached) -> None:
        self.handle = handle
        self.seen: Callable[..., Any] | None = None  # the last one that was found to wrap ours

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if torch.compiler.is_compiling() or not self.handle.is_attached():
            return None
        if module is not self.handle.model:
            raise RuntimeError(
                f"an attached model must run itself, got a replica of {type(module).__name__}, as DataParallel makes "
                "them: use DistributedDataParallel (torchrun)"
            )
        forward = module.__dict__.get("forward")
        if isinstance(forward, AudioForward) or (forward is not None and forward is self.seen):
            return None
        if any(isinstance(x, AudioForward) and x.handle is self.handle for x in within(forward)):
            self.seen = forward
            return None
        self.handle.replaced["forward"] = forward
        ours = AudioForward(self.handle)
        object.__setattr__(module, "forward", ours)
        # PyTorch has looked up theirs for this call already: it gets what ours would give it.
        request, arguments = ours.prepared(args, **kwargs)
        if request is None:
            return (), arguments

        def check_once(module: nn.Module, args: Any, outputs: Any) -> None:
            hook.remove()
            if outputs is not None:  # else it has raised
                self.handle.check_consumed(request)

        hook = module.register_forward_hook(check_once, always_call=True)
        return (), arguments


def within(function: Any, depth: int = DEPTH) -> Iterator[Any]:
    """Yield a function, and those that it was made of: by functools, as a method, in a closure, by an object."""
    yield function
    if not depth or not callable(function) or isinstance(function, nn.Module | type | PatchedMethod):
        return
    parts = [getattr(function, "__wrapped__", None), getattr(function, "__func__", None)]
    if isinstance(function, functools.partial):
        parts += [function.func, *function.args, *function.keywords.values()]
    for cell in getattr(function, "__closure__", None) or ():
        try:
            parts.append(cell.cell_contents)
        except ValueError:  # it is empty
            continue
    if not inspect.isroutine(function):
        parts += vars(function).values() if hasattr(function, "__dict__") else ()
    for part in parts:
        if callable(part) and part is not function:
            yield from within(part, depth - 1)


class PatchedMethod:
    """What an attached instance has in place of a method, and whoever wrapped it keeps after ``detach``.

    An object, not a bound method: pickling a bound method keeps its name alone, which a loaded model would look up in
    its class.
    """

    name: str
    takes_audio = True

    def __init__(self, handle: Attached) -> None:
        self.handle = handle
        self.original = handle.replaced[self.name]  # what it replaces; None: the class's own
        parameters = inspect.signature(getattr(type(handle.model), self.name)).parameters
        by_position = (x for x in parameters.values() if x.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self.positional = [x.name for x in by_position][1:]
        self.known = frozenset(parameters)

    @property
    def __signature__(self) -> inspect.Signature:
        """The class's own signature and ``audio``: transformers reads it."""
        signature = inspect.signature(getattr(type(self.handle.model), self.name))
        return _with_audio(signature) if self.takes_audio and self.handle.is_attached() else signature

    def stock(self, args: tuple[Any, ...], kwargs: dict[str, Any], audio: object = None) -> Any:
        """Make the call without audio."""
        if audio is not None:
            raise ValueError(f"the model must be attached where {self.name} is given audio, got it after detach")
        if self.original is None:
            return getattr(type(self.handle.model), self.name)(self.handle.model, *args, **kwargs)
        return self.original(*args, **kwargs)

    def by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return all arguments by name; raise as Python does where they do not fit."""
        names = self.positional
        twice = [name for name in names[: len(args)] if name in kwargs]
        if len(args) > len(names) or twice:
            got = f"{twice[0]} twice" if twice else f"{len(args)}"
            raise TypeError(f"{self.name} must be given at most {len(names)} positional arguments, got {got}")
        return {**dict(zip(names, args, strict=False)), **kwargs}

    def check_keywords(self, kwargs: dict[str, Any]) -> None:
        """Refuse audio under another name than ``audio``, which a stock model would pass over.

        Raises:
            TypeError: there is some.
        """
        for name, value in kwargs.items():
            misnamed = isinstance(value, OURS) and name != REQUEST_KEYWORD
            foreign = name not in self.known and value is not None and any(part in name for part in FOREIGN_KEYWORDS)
            if misnamed or foreign:
                raise TypeError(f"{self.name} must be given audio as audio=AudioState(...), got {name}=")


class AudioForward(PatchedMethod):
    """``forward`` of an attached model."""

    name = "forward"

    def __call__(self, *args: Any, audio: AudioState | EncodedAudio | Carried | None = None, **kwargs: Any) -> Any:
        handle = self.handle
        if args and args[0] is handle.model:
            args = args[1:]  # accelerate's unwrap_model binds whatever was its forward to the model
        if not handle.is_attached() or REQUEST_KEYWORD in kwargs:  # one that others put in place of ours calls ours
            return self.stock(args, kwargs, audio)
        if audio is None:
            audio = self.recalled({**dict(zip(self.positional, args, strict=False)), **kwargs})
        if audio is None and handle.model.training and hasattr(handle.decoder_layers[0], "unshard"):
            handle.check_layers()  # FSDP2: another process may have audio, and all must gather weights alike
        if audio is None and handle.parts is None:
            self.check_keywords(kwargs)
            return self.stock(args, kwargs)
        request, arguments = self.prepared(args, audio=audio, **kwargs)
        outputs = handle.stock(self.name)(**arguments)
        if request is not None:
            handle.check_consumed(request)
            if not isinstance(audio, Carried) and request.plan.packing is None:
                rows = text_rows(request.texts.batch, 1, request.texts.device)
                remember(cache_after(cache_of(arguments), outputs), request.state, rows)
        return outputs

    def recalled(self, arguments: dict[str, Any]) -> AudioState | None:
        """Return what a conversation that goes on has heard, but for the forwards of a generate call."""
        if memory_of(cache_of(arguments)) is None:
            return None
        within_generate = not torch.compiler.is_compiling() and current(self.handle.model) is not None
        return None if within_generate else recalled(arguments)

    def prepared(
        self, args: tuple[Any, ...], *, audio: AudioState | EncodedAudio | Carried | None = None, **kwargs: Any
    ) -> tuple[Request | None, dict[str, Any]]:
        """Return what the stock forward is given, by name, and its request if it has audio."""
        handle, arguments = self.handle, self.by_name(args, kwargs)
        self.check_keywords(kwargs)
        if isinstance(audio, Carried):  # a step that generate has prepared
            check_unchanged(audio.request, arguments)
            return audio.request, handle.prepared(audio.request, arguments)
        state = handle.connected(audio)
        arguments = handle.without_gradients(state, arguments)
        if state is None:
            return None, arguments
        request, arguments = handle.begin(state, arguments)
        return request, handle.prepared(request, arguments)


class AudioGenerate(PatchedMethod):
    """``generate`` of an attached model."""

    name = "generate"

    def __call__(self, *args: Any, audio: "AudioState | EncodedAudio | None" = None, **kwargs: Any) -> Any:
        if not self.handle.is_attached():
            return self.stock(args, kwargs, audio)
        self.check_keywords(kwargs)
        with torch.no_grad():
            state: AudioState | None = self.handle.connected(audio)
        return generate(self.handle, state, self.by_name(args, kwargs))


class AudioPrepare(PatchedMethod):
    """``prepare_inputs_for_generation`` of an attached model, which transformers calls before every forward."""

    name = "prepare_inputs_for_generation"
    takes_audio = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        generation = current(self.handle.model)
        if generation is None or generation.handle is not self.handle:
            return self.stock(args, kwargs)
        given = generation.whole_where_rope_changes(self.by_name(args, kwargs))
        arguments = prepared_whole(self.handle.stock(self.name), given)
        generation.prepare(arguments, given.get("attention_mask"))
        return arguments


class AudioSave(PatchedMethod):
    """``save_pretrained`` of an attached model: with a connector or projectors, the file that ``attach`` loads, too."""

    name = "save_pretrained"
    takes_audio = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments, handle = self.by_name(args, kwargs), self.handle
        directory, is_main = arguments.get("save_directory"), arguments.get("is_main_process", True)
        if handle.is_attached() and handle.parts is not None and directory is not None and is_main:
            handle.save_parts(directory, arguments.get("state_dict"))
        return self.stock(args, kwargs)


METHODS = (AudioForward, AudioGenerate, AudioPrepare, AudioSave)


def _with_audio(signature: inspect.Signature) -> inspect.Signature:
    """Return a signature with the keyword ``audio``, which stands before ``**kwargs``."""
    parameters = list(signature.parameters.values())
    audio = inspect.Parameter(
        "audio", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=AudioState | EncodedAudio | None
    )
    before = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    return signature.replace(parameters=[*parameters[:before], audio, *parameters[before:]])
