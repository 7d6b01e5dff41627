""":func:`attach` lets a stock Hugging Face causal LM take audio as extra keys and values (LAL).

The model's modules and weights stay as they are. Each selected layer's attention gets a copy of its config that names
our attention function; ``forward`` and ``generate`` of this one instance learn the keyword ``audio=``. Without audio
the stock functions run.
"""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from palkernels.model.causal_lm.attached import handle_of
from palkernels.model.causal_lm.config import LalConfig
from palkernels.model.causal_lm.handle import LalHandle
from palkernels.model.causal_lm.saving import FILE_NAME, load, named_modules
from palkernels.model.causal_lm.support import base_model


def attach(
    model: PreTrainedModel,
    config: "LalConfig | str | os.PathLike[str] | None" = None,
    *,
    connector: nn.Module | None = None,
    projectors: Mapping[int, nn.Module] | None = None,
) -> LalHandle:
    """Let a causal LM take ``audio=AudioState(...)`` in ``forward`` and ``generate``.

    The model is changed in place and works as before without audio. Attaching again with the same config returns the
    same handle. A peft model is attached by its base model; adapters may be added before or after.

    Each layer is run once to see whether it computes what is known here; where its weights have no values yet (on the
    meta device), the first forward with audio does that. Under ``torch.compile`` values are not looked at: a forward's
    ``position_ids`` and holes in its mask are ignored there.

    Args:
        config: the settings, or a directory that :meth:`LalHandle.save` wrote.
        connector: kept as ``handle.connector``, and by the model as a submodule, ``palkernels_audio``, so that it is
            trained, moved, sharded and saved with it. It turns an encoder's states (A, N, input size) into the model's
            (A, N, d). From a directory, those in :mod:`palkernels.model.connectors` and Linear are built; another class
            must be given here, and takes the saved weights.
        projectors: kept as ``handle.projectors``. By layer, each turns the connector's output into that layer's states.
            There is one for every layer that takes audio, or None where all share the connector's output.

    Raises:
        TypeError, ValueError: the model or the config is not supported, or a connector is no module or of another
            width; the message names the model and the reason.
    """
    config = LalConfig() if config is None else config
    for name, module in [("connector", connector), *(("a projector", x) for x in (projectors or {}).values())]:
        if module is not None and not isinstance(module, nn.Module):  # weights inside it would not be the model's
            raise TypeError(f"{name} must be an nn.Module, got {type(module).__name__}")
    model = base_model(model)
    saved = None
    if isinstance(config, str | os.PathLike):
        saved = load(model, config, connector, projectors)
        config, connector, projectors = saved.config, saved.connector, saved.projectors
    if not isinstance(config, LalConfig):
        raise TypeError(f"config must be a LalConfig or a directory, got {type(config).__name__}")
    attached = handle_of(model)
    if attached is not None:
        if not isinstance(attached, LalHandle) or attached.config != config:
            raise ValueError(f"the model must be detached before another config is attached, got {config}")
        if named_modules(connector, projectors):
            raise ValueError("the model must be detached before a connector or projectors are attached")
        return attached
    handle = LalHandle(model, config, connector, projectors)
    if not handle.selected:
        warnings.warn("layers should name a layer that hears the audio, got none: nobody hears it", stacklevel=2)
    if saved is None and connector is not None and (Path(model.name_or_path) / FILE_NAME).is_file():
        warnings.warn(
            f"the connector keeps the weights that it has, though {model.name_or_path} holds {FILE_NAME}: "
            f"attach(model, {model.name_or_path!r}) loads it",
            stacklevel=2,
        )
    if saved is not None:
        saved.fill()  # only now that nothing is refused any more: modules that were given take the saved weights
    return handle
