"""The operators' FLOPs for PyTorch's FlopCounterMode, whether it is imported before this package or after.

A counter copies the registered formulas when it is made, so they must be registered earlier than that: at our first
call it is too late. ``torch.utils.flop_counter``, which holds the registry, imports triton, and this package must not.
PyTorch has no other place for a formula. So where that module is not imported yet, this is the least that works: a
finder that lets Python's own find the module, and registers the formulas once the module's code has run.
"""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

COUNTER = "torch.utils.flop_counter"


def register() -> None:
    """Register the formulas now if the counter's module is imported, and otherwise when it will be."""
    if COUNTER in sys.modules:
        _register_with(sys.modules[COUNTER])
    elif not any(isinstance(finder, _RegisterOnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterOnImport())


def _register_with(counter: ModuleType) -> None:
    from palkernels import op_costs

    op_costs.register_flop_formulas(counter)


class _RegisterOnImport:  # a finder without importlib's base class, whose import takes as long as all else here
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == COUNTER else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]
            _register_with(module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
