"""The methods that an attached model has in place of its own: ``forward``, ``generate`` and what prepares a step."""

import inspect
from typing import Any

from palkernels.model.causal_lm.attached import HANDLE, Attached
from palkernels.model.causal_lm.caches import cache_of
from palkernels.model.causal_lm.generation import check_unchanged, current, generate
from palkernels.model.causal_lm.memory import cache_after, recalled, remember, text_rows
from palkernels.model.causal_lm.request import Carried
from palkernels.model.causal_lm.state import AudioState
from palkernels.model.causal_lm.texts import inputs_of


def patch(handle: Attached) -> None:
    """Give the handle's model its methods that take audio: the last step of attaching."""
    model = handle.model
    handle.replaced = {method.name: model.__dict__.get(method.name) for method in METHODS}
    object.__setattr__(model, HANDLE, handle)
    for method in METHODS:
        object.__setattr__(model, method.name, method(handle))


def unpatch(handle: Attached) -> None:
    """Put the model's own methods back: the last step of detaching."""
    model = handle.model
    for name, replaced in handle.replaced.items():
        method = model.__dict__.get(name)
        if not isinstance(method, PatchedMethod) or method.handle is not handle:
            continue  # somebody has wrapped ours, which only passes on what it is given from now on
        if replaced is None:
            object.__delattr__(model, name)
        else:
            object.__setattr__(model, name, replaced)
    object.__delattr__(model, HANDLE)


class PatchedMethod:
    """What an attached instance has in place of a method, and whoever wrapped it keeps after ``detach``.

    An object, not a bound method: pickling a bound method keeps its name alone, which a loaded model would look up in
    its class.
    """

    name: str
    takes_audio = True

    def __init__(self, handle: Attached) -> None:
        self.handle = handle
        parameters = inspect.signature(getattr(type(handle.model), self.name)).parameters.values()
        self.positional = [x.name for x in parameters if x.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD][1:]

    @property
    def __signature__(self) -> inspect.Signature:
        """The class's own signature and ``audio``: transformers reads it."""
        signature = inspect.signature(getattr(type(self.handle.model), self.name))
        return _with_audio(signature) if self.takes_audio and self.handle.is_attached() else signature

    def stock(self, args: tuple[Any, ...], kwargs: dict[str, Any], audio: object = None) -> Any:
        """Make the call without audio."""
        if audio is not None:
            raise ValueError(f"the model must be attached where {self.name} is given audio, got it after detach")
        return self.handle.stock(self.name)(*args, **kwargs)

    def by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return all arguments by name; raise as Python does where they do not fit."""
        names = self.positional
        twice = [name for name in names[: len(args)] if name in kwargs]
        if len(args) > len(names) or twice:
            got = f"{twice[0]} twice" if twice else f"{len(args)}"
            raise TypeError(f"{self.name} must be given at most {len(names)} positional arguments, got {got}")
        return {**dict(zip(names, args, strict=False)), **kwargs}


class AudioForward(PatchedMethod):
    """``forward`` of an attached model."""

    name = "forward"

    def __call__(self, *args: Any, audio: AudioState | Carried | None = None, **kwargs: Any) -> Any:
        if args and args[0] is self.handle.model:
            args = args[1:]  # accelerate's unwrap_model binds whatever was its forward to the model
        if audio is None and self.handle.is_attached() and current(self.handle.model) is None:
            audio = recalled(self.by_name(args, kwargs))  # of a conversation that goes on
        if audio is None or not self.handle.is_attached():
            return self.stock(args, kwargs, audio)
        arguments = self.by_name(args, kwargs)
        if isinstance(audio, Carried):  # a step that generate has prepared
            check_unchanged(audio.request, arguments)
            return self.handle.run(audio.request, arguments)
        outputs = self.handle.forward(audio, arguments)
        inputs = inputs_of(arguments)
        rows = text_rows(inputs.shape[0], 1, inputs.device)
        remember(cache_after(cache_of(arguments), outputs), audio, rows)
        return outputs


class AudioGenerate(PatchedMethod):
    """``generate`` of an attached model."""

    name = "generate"

    def __call__(self, *args: Any, audio: AudioState | None = None, **kwargs: Any) -> Any:
        if not self.handle.is_attached():
            return self.stock(args, kwargs, audio)
        return generate(self.handle, audio, self.by_name(args, kwargs))


class AudioPrepare(PatchedMethod):
    """``prepare_inputs_for_generation`` of an attached model, which transformers calls before every forward."""

    name = "prepare_inputs_for_generation"
    takes_audio = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        generation = current(self.handle.model)
        if generation is None or generation.handle is not self.handle:
            return self.stock(args, kwargs)
        given = generation.whole_where_rope_changes(self.by_name(args, kwargs))
        arguments = self.stock((), given)
        generation.prepare(arguments, given.get("attention_mask"))
        return arguments


METHODS = (AudioForward, AudioGenerate, AudioPrepare)


def _with_audio(signature: inspect.Signature) -> inspect.Signature:
    """Return a signature with the keyword ``audio``, which stands before ``**kwargs``."""
    parameters = list(signature.parameters.values())
    audio = inspect.Parameter("audio", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=AudioState | None)
    before = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    return signature.replace(parameters=[*parameters[:before], audio, *parameters[before:]])
