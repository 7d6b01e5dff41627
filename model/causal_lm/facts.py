"""What the host must know of values that lie on the device: all of it in one transfer."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake


class DeviceFacts:
    """Facts about tensors, gathered first and then read together.

    Reading a value from a GPU waits for everything queued there. One forward therefore asks for all that it must know
    and reads once.
    """

    def __init__(self) -> None:
        self._asked: dict[str, Tensor] = {}

    @property
    def asked(self) -> bool:
        """Whether there is anything to read."""
        return len(self._asked) > 0

    def ask(self, name: str, fact: Tensor) -> None:
        """Note a bool or an integer, a tensor of one element, to be read under ``name``."""
        self._asked[name] = fact

    def read(self) -> dict[str, int] | None:
        """Return the facts by name, or None where tensors have no values: under torch.compile, and fake ones."""
        if torch.compiler.is_compiling() or any(is_fake(fact) for fact in self._asked.values()):
            return None
        if not self._asked:
            return {}
        values = torch.stack([fact.reshape(()).to(torch.int64) for fact in self._asked.values()]).tolist()
        return dict(zip(self._asked, values, strict=True))
