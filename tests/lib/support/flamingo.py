"""Models with gated layers, audio for them, and the new layers written out by hand."""

import torch
from torch.nn.functional import layer_norm

from palkernels.model import AudioState
from palkernels.model.causal_lm.flamingo import attach_flamingo
from support.attached import TOKENS, WIDTH, texts
from support.attached import batch as padded_batch
from support.oracles import build

# lengths, index and insert_at of the audio; text rows 0, 1 and 2 have 7, 4 and 9 tokens
KINDS = {
    "prefix": {},
    "lengths": {"lengths": [6, 0, 3]},
    "inserted": {"lengths": [4, 6, 5], "insert_at": [3, 4, 0]},
    "two clips": {
        "lengths": [6, 5, 6],
        "insert_at": [[1, 1, 1, 5, 5, 5], [0, 0, 2, 2, 2, 2], [9, 9, 9, 9, 9, 9]],
    },
    "shared": {"lengths": [6, 2], "index": [1, 0, 0], "insert_at": [2, 4, 1]},
    "none": {"lengths": [0, 0, 0]},
}


def audio(kind, dtype=torch.float64):
    fields = {name: torch.tensor(value) for name, value in KINDS[kind].items()}
    generator = torch.Generator().manual_seed(5)
    rows = 2 if kind == "shared" else 3
    states = torch.randn(rows, TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    return AudioState(states.to(dtype), **fields)


def batch(side):
    _, padded, mask = padded_batch(texts(), side)
    return padded, mask


def positions(mask):
    """Positions (B, T) that count each row's own text from 0, past its padding.

    RoPE's angles are float32: at the positions of the padded batch they differ by 1e-7.
    """
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def open_gates(handle, seed=3):
    """Give gates and norms other values than they begin with."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in handle.layers.named_parameters():
        if "gate" in name:
            parameter.data.copy_(torch.rand(1, generator=generator) + 0.5)
        elif "norm" in name:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)


def attached(family="llama", every=2, dtype=torch.float64, **settings):
    model = build(family, dtype)
    torch.manual_seed(7)
    handle = attach_flamingo(model, every, **settings)
    open_gates(handle)
    return model, handle


def by_hand(stock, layers, ids, states, insert_at):
    """Logits (T, V) of one unpadded row, every new layer written out query by query."""

    def before(new):
        weights = {name: p.detach() for name, p in new.named_parameters()}

        def norm(name, x):
            return layer_norm(x, (WIDTH,), weights[f"{name}.weight"], weights[f"{name}.bias"])

        def hook(module, args):
            rows = []
            for t, y in enumerate(args[0][0]):
                seen = states[insert_at <= t]
                if len(seen):
                    query = (norm("attention_norm", y) @ weights["q_proj.weight"].T).view(-1, new.head_dim)
                    keys = (seen @ weights["k_proj.weight"].T).view(len(seen), -1, new.head_dim)
                    values = (seen @ weights["v_proj.weight"].T).view(len(seen), -1, new.head_dim)
                    heads = []
                    for h in range(len(query)):
                        share = (keys[:, h] @ query[h] / new.head_dim**0.5).softmax(dim=0)
                        heads.append(share @ values[:, h])
                    y = y + weights["attention_gate"].tanh() * (weights["o_proj.weight"] @ torch.cat(heads))
                    wide = (weights["up_proj.weight"] @ norm("ffn_norm", y)).relu().square()
                    y = y + weights["ffn_gate"].tanh() * (weights["down_proj.weight"] @ wide)
                rows.append(y)
            return (torch.stack(rows)[None], *args[1:])

        return hook

    hooks = [stock.model.layers[int(i)].register_forward_pre_hook(before(new)) for i, new in layers.items()]
    try:
        return stock(ids[None], use_cache=False).logits[0]
    finally:
        for hook in hooks:
            hook.remove()


def rows_of(state):
    """Each text row's valid audio (n, d) and where it stands (n,)."""
    results = []
    for b in range(3):
        a = b if state.index is None else int(state.index[b])
        n = TOKENS if state.lengths is None else int(state.lengths[a])
        at = torch.zeros(n, dtype=torch.long)
        if state.insert_at is not None:
            at = state.insert_at[b].reshape(-1).expand(TOKENS)[:n]
        results.append((state.states[a, :n], at))
    return results
