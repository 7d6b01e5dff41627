"""What a layer asks of the host in one decoding step, counted in ``generate``: all else of the call is taken off."""

import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from support.counting import count_calls, count_operators
from support.oracles import FAMILIES, SIZES

LAYERS = (2, 6)  # of two models that are compared
TOKENS = (4, 7)  # that each generates; the first steps of a process do more
CACHES = {"dynamic": {}, "static": {"cache_implementation": "static", "disable_compile": True}}
MOST = 1.3  # of stock's calls
# What a repeated call of lal_attention adds, which a GPU's stand-in does with 4 more (test_plans).
REPEATED = {"Python calls": 25, "C calls": 0}
ONE_OPERATOR = "one_operator"  # the name of a stock attention function


def one_operator(query, *args, **kwargs):
    """Stands in for lal_attention, whose own costs are tested elsewhere."""
    return torch.empty_like(query)


def one_operator_of_stock(module, query, *args, **kwargs):
    """Stands in for a stock attention function."""
    return one_operator(query).transpose(1, 2), None


AttentionInterface.register(ONE_OPERATOR, one_operator_of_stock)


def deep(family, layers):
    """A stock model of so many layers, of the windows of its family; gemma3's take turns."""
    model_type, changes = FAMILIES[family]
    if "layer_types" in changes:
        changes = changes | {"layer_types": ["sliding_attention", "full_attention"] * (layers // 2)}
    config = AutoConfig.for_model(model_type, **(SIZES | changes | {"num_hidden_layers": layers}))
    return AutoModelForCausalLM.from_config(config).eval()


def per_step(generate, count):
    """What a further step adds to a call of ``generate``, which takes the number of tokens: a number for each name.

    Args:
        count: counts what a function without arguments does, by name.
    """
    generate(TOKENS[0])
    few, many = (count(lambda tokens=tokens: generate(tokens)) for tokens in TOKENS)
    return {name: (many[name] - few[name]) / (TOKENS[1] - TOKENS[0]) for name in few}


def per_layer_and_step(model_of, count):
    """What a further layer adds to what a further step adds, by name; ``model_of`` takes the number of layers, and
    returns what generates."""
    few, many = (per_step(model_of(layers), count) for layers in LAYERS)
    return {name: (many[name] - few[name]) / (LAYERS[1] - LAYERS[0]) for name in few}


# What is counted in one run.
HOST = {
    "calls": lambda run: dict(zip(("Python calls", "C calls"), count_calls(run), strict=True)),
    "operators": lambda run: {"operators": count_operators(run)},
}
