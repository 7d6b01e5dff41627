"""What configs tell of a layer."""

import pytest
from support.oracles import build

from palkernels.model.causal_lm.layers import head_dim_of


@pytest.mark.parametrize(("family", "head_dim"), [("llama", 16), ("qwen3", 24)], ids=["derived", "stated"])
def test_head_dim_of_a_config(family, head_dim):
    model = build(family)
    assert head_dim_of(model.config) == head_dim == model.model.layers[0].self_attn.head_dim
