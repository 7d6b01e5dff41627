"""Training: from a recipe and samples to a trained audio LLM, by transformers' Trainer.

    recipe = load_recipe("recipe.yaml", ["stages.align.lr=1e-4"])
    last = train(recipe)                                     # the folder of the model after the last stage
    load_trained(model, last / "trained.safetensors")        # what the stage trained, into the model it began with

docs/training.md is the page for users. Below run.py, a whole run: loop.py (one stage), material.py (its samples),
order.py (which of them a step is of), stages.py (what trains), trained.py (the file of it), recipe.py.
"""

from typing import TYPE_CHECKING

from palkernels import lazy as _lazy

if TYPE_CHECKING:
    from palkernels.model.training.recipe import Recipe, RecipeError, load_recipe
    from palkernels.model.training.run import Plan, RunError, Stopped, train
    from palkernels.model.training.trained import load_trained

__all__ = ["Plan", "Recipe", "RecipeError", "RunError", "Stopped", "load_recipe", "load_trained", "train"]

_NAMES_BY_MODULE = {
    "recipe": ("Recipe", "RecipeError", "load_recipe"),
    "run": ("Plan", "RunError", "Stopped", "train"),
    "trained": ("load_trained",),
}
if not TYPE_CHECKING:
    __getattr__, __dir__ = _lazy.exports(
        __name__, {name: f"{__name__}.{module}" for module, names in _NAMES_BY_MODULE.items() for name in names}
    )
