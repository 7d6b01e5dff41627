"""Seeded faults in the kernels, each run against tests that must catch it.

python scripts/mutants.py            run every mutant, write tests/mutants.json; exit with 1 if one survives
python scripts/mutants.py NAME ...   run these; of the others, as they are in the table, keep what was found before

Each mutant is a copy of the package with one text replaced. A plugin inside pytest checks that the copy is what the
tests imported. A mutant is killed by a failing test, a signal or the timeout; anything else stops the script.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUTCOME = ROOT / "tests" / "mutants.json"
SMALL = "tests/attention/test_small_cases.py"
GUARDED = "tests/attention/test_memory.py::test_between_unreadable_pages"
SUBSETS = "tests/attention/test_gradcheck.py::test_a_subset_does_only_its_work"
SPECIAL = ("tests/attention/test_decode.py", "tests/attention/test_varlen.py")
SELECTION = (SMALL, SUBSETS, GUARDED, *SPECIAL)
AUDIO_KV = ("tests/projection/test_audio_kv.py", GUARDED)
AT_ONCE = 2
TIMEOUT = 480  # seconds, per mutant; all tests together take half of it while another mutant runs
DOES_NOT_RUN = ("AttributeError", "CompilationError", "ImportError", "NameError", "SyntaxError", "TypeError")

PRIMITIVES, KEYS = "kernels/primitives.py", "kernels/keys.py"
FORWARD, BACKWARD, DECODE = "kernels/forward.py", "kernels/backward.py", "kernels/decode.py"
OPERANDS, OPS = "kernels/operands.py", "attention/ops.py"
STEPS, PROJECTION = "kernels/projection.py", "projection/ops.py"
PLAIN, RECOMPUTE = "projection/steps.py", "projection/recipes.py"

CLASSES = (
    "masks",
    "offsets",
    "strides",
    "scale",
    "lengths and bounds",
    "online softmax",
    "reductions",
    "skipped blocks",
    "dispatch",
    "packed rows",
    "audio_kv",
)


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str  # within palkernels/
    old: str
    new: str
    count: int = 1  # how often the old text occurs; every occurrence is replaced
    first: str = ""  # tests whose names contain this run first, to save time
    kind: str = field(kw_only=True)  # one of CLASSES
    tests: tuple[str, ...] = SELECTION

    def apply(self, source: str) -> str:
        found = source.count(self.old)
        if found != self.count:
            raise ValueError(
                f"mutant {self.name!r}: the old text must occur {self.count} times in {self.file}, got {found}"
            )
        return source.replace(self.old, self.new)


def _masks() -> list[Mutant]:
    mutant = partial(Mutant, kind="masks")

    causal = "visible = loaded[None, :] & (token[None, :] <= position[:, None])"
    window = "token[None, :] > position[:, None] - window"
    text = "valid = (token >= text.start) & (token < text.end)"
    return [
        mutant("causal, one too few", KEYS, causal, causal.replace("<=", "<")),
        mutant("causal, one too many", KEYS, causal, causal.replace("[:, None])", "[:, None] + 1)")),
        mutant("causal in key gradients", BACKWARD, "age >= 0 if window is None", "age > 0 if window is None"),
        mutant("window, one too many", KEYS, window, window.replace(">", ">="), first="window"),
        mutant("window in key gradients", BACKWARD, "(age < window)", "(age <= window)", first="window"),
        mutant(
            "visible_from compare",
            KEYS,
            "visible_from[None, :] <= position",
            "visible_from[None, :] < position",
            first="visible_from",
        ),
        mutant(
            "unseen audio is loaded",
            KEYS,
            "loaded = loaded & (visible_from < NEVER)",
            "loaded = loaded",
            first="sees_is_not_used[visible",
        ),
        mutant("visible_from wraps", KEYS, "tl.maximum(first, 0), NEVER)", "first, NEVER)", first="clamped"),
        mutant(
            "never is the text's length",
            KEYS,
            "NEVER).to(tl.int32)",
            "text.end).to(tl.int32)",
            first="sees_is_not_used[visible",
        ),
        mutant(
            "never from the text's length on",
            KEYS,
            "tl.where(first < text.end,",
            "tl.where(first < 38,",
            first="sees_is_not_used[visible",
        ),
        mutant("length compare", KEYS, "loaded = token < audio.length", "loaded = token <= audio.length"),
        mutant("text_start ignored", KEYS, "tile_first, text.start,", "tile_first, 0,", first="padding"),
        mutant("text_start ignored in key gradients", BACKWARD, text, "valid = token < text.end", first="padding"),
        mutant(
            "text_end ignored in key gradients",
            BACKWARD,
            text,
            text.replace("text.end", "sizes.num_keys"),
            first="sees_is_not_used[window",
        ),
        mutant(
            "scores are hidden by a finite number",
            FORWARD,
            'tl.where(visible, scores, float("-inf"))',
            "tl.where(visible, scores, -1e4)",
            first="blind",
        ),
        mutant(
            "no where on dscores of queries",
            BACKWARD,
            "        dscores = tl.where(visible, dscores, 0.0)\n    return",
            "        dscores = dscores\n    return",
        ),
        mutant("no where on weights", BACKWARD, "weights = tl.where(visible, weights, 0.0)", "weights = weights"),
        mutant(
            "no second where on dscores of keys",
            BACKWARD,
            "            dscores = tl.where(visible, dscores, 0.0)\n        dkey",
            "            dscores = dscores\n        dkey",
            first="sees_is_not_used[visible",
        ),
    ]


def _offsets() -> list[Mutant]:
    mutant = partial(Mutant, kind="offsets")

    head = "text, kv_head * GROUP,"
    values = "load_rows(value, audio, kv_head,"
    return [
        mutant("queries of head kv_head", FORWARD, f"load_rows(query, {head}", "load_rows(query, text, kv_head,"),
        mutant("dQ to head kv_head", BACKWARD, f"store_rows(dquery, {head}", "store_rows(dquery, text, kv_head,"),
        mutant(
            "dO of head kv_head in key gradients",
            BACKWARD,
            f"douts = load_rows(dout, {head} t, member, row_ok, HEAD_DIM)\n    pointers",
            "douts = load_rows(dout, text, kv_head, t, member, row_ok, HEAD_DIM)\n    pointers",
        ),
        mutant("member ignored", PRIMITIVES, " + member * matrix.head)", ")"),
        mutant("member ignored in the LSE", PRIMITIVES, "(member * sizes.text_tokens + t)", "t"),
        mutant("head and batch swapped in per_row", PRIMITIVES, "row.batch * sizes.num_kv_heads + kv_head", "kv_head"),
        mutant(
            "whole blocks of the text row",
            KEYS,
            "rows, 0, full_end, audio,",
            "rows, 0, full_end, text,",
            first="index",
        ),
        mutant(
            "audio values of the text row",
            KEYS,
            values,
            values.replace(" audio,", " text,"),
            first="index",
        ),
        mutant(
            "length of the first row",
            KEYS,
            "tl.load(visibility.audio_lengths + row)",
            "tl.load(visibility.audio_lengths + row * 0)",
            first="index",
        ),
        mutant(
            "text bounds of the audio row",
            BACKWARD,
            "text = text_row(visibility, batch, sizes)\n        seen_from",
            "text = text_row(visibility, row, sizes)\n        seen_from",
            first="everything",
        ),
        mutant(
            "batch not widened",
            PRIMITIVES,
            "tl.cast(row.batch, tl.int64) * matrix",
            "row.batch * matrix",
            first="32_bits",
        ),
        mutant("head not widened", PRIMITIVES, "tl.cast(head, tl.int64) * matrix", "head * matrix", first="32_bits"),
        mutant("token not widened", PRIMITIVES, "token = token.to(tl.int64)", "token = token", first="32_bits"),
        mutant("dim not widened", PRIMITIVES, "dim = dim.to(tl.int64)", "dim = dim", first="32_bits"),
        mutant(
            "batch of visible_from not widened",
            KEYS,
            "batch = tl.cast(text.batch, tl.int64)",
            "batch = text.batch",
            first="32_bits",
        ),
        mutant(
            "token of visible_from not widened",
            KEYS,
            "place = audio.first + token.to(tl.int64)",
            "place = audio.first + token",
            first="32_bits",
        ),
        mutant("masked lanes overflow", OPERANDS, "span + slack >= 2**31", "span >= 2**31", first="32_bits"),
    ]


def _strides() -> list[Mutant]:
    mutant = partial(Mutant, kind="strides")

    return [
        mutant(
            "token and head swapped",
            PRIMITIVES,
            "token * matrix.token + member * matrix.head",
            "token * matrix.head + member * matrix.token",
        ),
        mutant("dim is contiguous", PRIMITIVES, "dim * matrix.dim, column_ok", "dim, column_ok"),
        mutant(
            "batch by the head's stride",
            PRIMITIVES,
            "tl.cast(row.batch, tl.int64) * matrix.batch",
            "tl.cast(row.batch, tl.int64) * matrix.head",
        ),
        mutant(
            "visible_from's strides swapped",
            KEYS,
            "batch * visibility.visible_from_batch + place * visibility.visible_from_token",
            "batch * visibility.visible_from_token + place * visibility.visible_from_batch",
            first="visible_from",
        ),
        mutant(
            "visible_from is contiguous",
            OPERANDS,
            "else audio_visible_from.stride()",
            "else (audio_visible_from.shape[1], 1)",
            first="visible_from",
        ),
        mutant("integers of any strides", OPERANDS, "else x.contiguous()\n", "else x\n", first="everything"),
        mutant(
            "dLSE of any strides",
            BACKWARD,
            "None if dlse is None else dlse.contiguous()",
            "dlse",
            first="upstream",
        ),
        mutant(
            "dO by the query's strides",
            BACKWARD,
            "        Matrix.of(dout),\n",
            "        Matrix(dout, *Matrix.of(call.query)[1:]),\n",
        ),
    ]


def _scale() -> list[Mutant]:
    mutant = partial(Mutant, kind="scale")

    slope = " * softcap_slope(scores, SOFTCAP)\n"
    masked = "    if visible is not None:"
    return [
        mutant("no scale on dQ", BACKWARD, "gradient * SCALE, HEAD_DIM", "gradient, HEAD_DIM"),
        mutant("no scale on dK", BACKWARD, "gradients[0] * SCALE", "gradients[0]"),
        mutant("log2 e rounded", PRIMITIVES, "1.4426950408889634", "1.442695"),
        mutant("ln 2 rounded", PRIMITIVES, "0.6931471805599453", "0.6931472"),
        mutant("LSE in base 2", FORWARD, "row_max * LN_2 + tl.log(total)", "row_max + tl.log2(total)"),
        mutant("natural LSE in dK and dV", BACKWARD, "other=0.0) * LOG2_E\n    delta", "other=0.0)\n    delta"),
        mutant("no softcap slope in dQ", BACKWARD, f"{slope}{masked}\n", f"\n{masked}\n", first="visible_from"),
        mutant(
            "no softcap slope in dK",
            BACKWARD,
            f"{slope}    {masked}  # again",
            f"\n    {masked}  # again",
            first="visible_from",
        ),
        mutant(
            "softcap slope of base-2 scores",
            PRIMITIVES,
            "scores / (SOFTCAP * LOG2_E)",
            "scores / SOFTCAP",
            first="visible_from",
        ),
        mutant("scale not capped", PRIMITIVES, "(SCALE / SOFTCAP)", "SCALE", first="visible_from"),
        mutant("tanh's series", PRIMITIVES, "(-1 / 3 +", "(1 / 3 +", first="rounding[visible"),
        mutant("float64 in float32", PRIMITIVES, "return tl.float64 if", "return tl.float32 if"),
    ]


def _lengths_and_bounds() -> list[Mutant]:
    mutant = partial(Mutant, kind="lengths and bounds", first="clamped")

    def clamp(value: str, low: str, high: str) -> str:
        return f"clamp({value}, {low}, {high})"

    end, start = "tl.load(visibility.text_end + batch)", "tl.load(visibility.text_start + batch)"
    row, length = "tl.load(visibility.audio_index + batch)", "tl.load(visibility.audio_lengths + row)"
    last = "sizes.num_audio_rows - 1"
    load = "tl.load(pointers, mask=token_ok[:, None] & column_ok, other=0.0)"
    dout = "douts = load_rows(dout, text, kv_head * GROUP, t, member, {}, HEAD_DIM)\n    pointers"
    return [
        mutant(
            "text_end too large",
            KEYS,
            clamp(end, "sizes.num_queries", "end"),
            f"tl.maximum({end}, sizes.num_queries).to(tl.int32)",
        ),
        mutant("text_start negative", KEYS, clamp(start, "0", "end"), f"tl.minimum({start}, end).to(tl.int32)"),
        mutant("text_start too large", KEYS, clamp(start, "0", "end"), f"tl.maximum({start}, 0).to(tl.int32)"),
        mutant("audio_index negative", KEYS, clamp(row, "0", last), f"tl.minimum({row}, {last}).to(tl.int32)"),
        mutant("audio_index too large", KEYS, clamp(row, "0", last), f"tl.maximum({row}, 0).to(tl.int32)"),
        mutant("audio_lengths too large", KEYS, clamp(length, "0", "length"), f"tl.maximum({length}, 0).to(tl.int32)"),
        mutant("readers not clamped", KEYS, clamp("index", "0", last), "index"),
        mutant(
            "audio_length ignored in key gradients",
            BACKWARD,
            "valid = token < audio.length",
            "valid = token < sizes.num_audio",
            first="index",
        ),
        mutant("columns beyond D are loaded", PRIMITIVES, load, load.replace(" & column_ok", ""), first=""),
        mutant(
            "columns beyond D are stored",
            PRIMITIVES,
            "element_ty), mask=token_ok[:, None] & column_ok)",
            "element_ty), mask=token_ok[:, None])",
            first="",
        ),
        mutant(
            "queries beyond the last are loaded",
            FORWARD,
            "t, member, row_ok, HEAD_DIM)\n    acc_type",
            "t, member, None, HEAD_DIM)\n    acc_type",
            first="unreadable",
        ),
        mutant("dO beyond the last query", BACKWARD, dout.format("row_ok"), dout.format("None"), first=""),
        mutant(
            "LSE beyond the last query is loaded",
            BACKWARD,
            "mask=row_ok, other=0.0) * LOG2_E\n    delta",
            "mask=t >= 0, other=0.0) * LOG2_E\n    delta",
            first="unreadable",
        ),
        mutant(
            "output beyond the last query",
            FORWARD,
            "row_ok, acc / total[:, None]",
            "t >= 0, acc / total[:, None]",
            first="unreadable",
        ),
        mutant(
            "gradients beyond the last token", BACKWARD, "token < num_tokens", "token >= 0", count=2, first="unreadable"
        ),
        mutant(
            "gradients of hidden keys",
            BACKWARD,
            "tl.where(valid[:, None], gradients[0] * SCALE, 0.0)",
            "gradients[0] * SCALE",
            first="index",
        ),
        mutant(
            "audio beyond the length is loaded",
            KEYS,
            "load_rows(key, audio, kv_head, token, 0, loaded, HEAD_DIM)",
            "load_rows(key, audio, kv_head, token, 0, None, HEAD_DIM)",
            first="",
        ),
    ]


def _online_softmax() -> list[Mutant]:
    mutant = partial(Mutant, kind="online softmax")

    shift = 'tl.where(new_max == float("-inf"), 0.0, new_max) if visible is not None else new_max'
    return [
        mutant("sum does not decay", FORWARD, "row_sum * decay +", "row_sum +"),
        mutant("output does not decay", FORWARD, "acc * decay[:, None])", "acc)"),
        mutant(
            "maximum of the block alone",
            FORWARD,
            "tl.maximum(row_max, block_max if factor is None else block_max * factor)",
            "block_max if factor is None else block_max * factor",
        ),
        mutant("shift of -inf", FORWARD, shift, "new_max", first="blind"),
        mutant("shift of zero", FORWARD, shift, "new_max * 0.0", first="large"),
        mutant(
            "weights by the old maximum",
            FORWARD,
            "scores * factor) - shift[:, None]",
            "scores * factor) - row_max[:, None]",
        ),
        mutant(
            "factor of any sign waits", FORWARD, "softcap is None and scale > 1e-30", "softcap is None", first="scale"
        ),
        mutant("the maximum without the factor", FORWARD, "else block_max * factor", "else block_max", first="large"),
        mutant("blind rows divide by zero", FORWARD, "tl.where(blind, 1.0, row_sum)", "row_sum", first="blind"),
    ]


def _reductions() -> list[Mutant]:
    mutant = partial(Mutant, kind="reductions")

    found = "tl.where(first <= row, row, none)"
    return [
        mutant(
            "first reader from row 1",
            BACKWARD,
            "tl.where(beyond, sizes.num_batches, 0)",
            "tl.where(beyond, sizes.num_batches, 1)",
        ),
        mutant(
            "a reader skipped",
            BACKWARD,
            "next_reader(visibility, row, batch + 1, sizes)",
            "next_reader(visibility, row, batch + 2, sizes)",
            first="index",
        ),
        mutant("first scan only", KEYS, "& (first < none):", "& (first < 128):", first="beyond_one_scan"),
        mutant("a scan skipped", KEYS, "first += 128", "first += 256", first="beyond_one_scan"),
        mutant("own reader compare", KEYS, found, found.replace("<=", "<")),
        mutant(
            "last reader only",
            BACKWARD,
            "add_text_row(\n            gradients, keys",
            "add_text_row(\n            (zeros, zeros), keys",
            first="index",
        ),
        mutant("delta without dLSE", BACKWARD, "delta -= tl.load(", "delta -= 0.0 * tl.load("),
        mutant("sign of dLSE", BACKWARD, "delta -= tl.load(", "delta += tl.load("),
        mutant("sign of delta in dQ", BACKWARD, "(dweights - delta[:, None])", "(dweights + delta[:, None])"),
        mutant("no delta in dK", BACKWARD, "(dweights - delta[None, :])", "dweights"),
    ]


def _skipped_blocks() -> list[Mutant]:
    mutant = partial(Mutant, kind="skipped blocks")

    begin = "earliest - first_position, 0)"
    masked = "tl.cdiv(partly, BLOCK_M) * BLOCK_M"
    full = "tl.minimum(tile_first + 1, end)"
    last = "tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUP, text.num_queries - 1)"
    return [
        mutant(
            "partly valid audio blocks",
            BACKWARD,
            "block * BLOCK_N >= audio.length",
            "(block + 1) * BLOCK_N > audio.length",
        ),
        mutant(
            "audio, a whole block too many",
            KEYS,
            "full_end = audio.length // BLOCK_N * BLOCK_N",
            "full_end = (audio.length + BLOCK_N - 1) // BLOCK_N * BLOCK_N",
        ),
        mutant("audio ends early", KEYS, "range(full_end, audio.length,", "range(full_end, audio.length - 1,"),
        mutant("text, whole blocks up to the last row", KEYS, full, "end"),
        mutant("text, whole blocks one key too far", KEYS, full, full.replace("+ 1", "+ 2"), first="decoding"),
        mutant("text ends early", KEYS, "range(full_end, end,", "range(full_end, end - 1,", first="narrow"),
        mutant(
            "tile's last query not clamped", KEYS, last, last[11 : last.rindex(",")], first="sees_is_not_used[window"
        ),
        mutant(
            "tile's first query rounded up",
            KEYS,
            "first_position + tile * BLOCK_M // GROUP",
            "first_position + (tile * BLOCK_M + GROUP - 1) // GROUP",
            first="window",
        ),
        mutant("window begins late", KEYS, "tile_first - window + 1)", "tile_first - window + 2)", first="window"),
        mutant("queries begin late", BACKWARD, begin, begin.replace("position", "position + 1")),
        mutant("queries without a mask too early", BACKWARD, masked, "partly // BLOCK_M * BLOCK_M"),
        mutant("earliest key's queries", BACKWARD, "earliest = tl.min(", "earliest = tl.max("),
        mutant("window ends early", BACKWARD, "latest + window - first", "latest + window - 1 - first", first="window"),
        mutant(
            "last rows have no program",
            FORWARD,
            "triton.cdiv(num_rows, tile.block_m)",
            "max(num_rows // tile.block_m, 1)",
        ),
        mutant(
            "programs by text rows",
            BACKWARD,
            "num_blocks += call.num_audio_rows",
            "num_blocks += call.num_batches",
            first="index",
        ),
    ]


def _dispatch() -> list[Mutant]:
    mutant = partial(Mutant, kind="dispatch", first="subset")

    return [
        mutant(
            "delta for dQ only",
            BACKWARD,
            'if gradients["query"] is not None or wants_keys:',
            'if gradients["query"] is not None:',
        ),
        mutant(
            "delta not passed to dK alone",
            BACKWARD,
            "_key_launch(call, lse, dout, delta, keys,",
            "_key_launch(call, lse, dout, None, keys,",
        ),
        mutant("always split", BACKWARD, " and tiles.splits_key_gradient(call.head_dim):", ":"),
        mutant(
            "gradients swapped",
            BACKWARD,
            'for name in ("key", "value", "audio_key", "audio_value")',
            'for name in ("value", "key", "audio_key", "audio_value")',
        ),
        mutant(
            "audio values only with keys",
            BACKWARD,
            "if daudio_key.ptr is not None or daudio_value.ptr is not None:",
            "if daudio_key.ptr is not None:",
        ),
        mutant(
            "WITH_KEY and WITH_VALUE swapped",
            BACKWARD,
            "    " * 3 + "kv_head, sizes, dkey.ptr is not None, dvalue.ptr is not None,",
            "    " * 3 + "kv_head, sizes, dvalue.ptr is not None, dkey.ptr is not None,",
        ),
        mutant("returned in reverse", OPS, "gradient in gradients.values()", "gradient in [*gradients.values()][::-1]"),
        mutant("dO of ones", OPS, "dout = torch.zeros_like(out)", "dout = torch.ones_like(out)", first="upstream"),
    ]


def _decode() -> list[Mutant]:
    masks, offsets, merge = (
        partial(Mutant, file=DECODE, first="test_decode", kind=kind) for kind in ("masks", "offsets", "online softmax")
    )
    bounds, shares, readers = (
        partial(Mutant, file=DECODE, first="test_decode", kind=kind)
        for kind in ("lengths and bounds", "skipped blocks", "reductions")
    )
    early = "tl.minimum(tile_first + 1, end)"
    return [
        masks("visible_from compare in decoding", old="visible_from <= position", new="visible_from < position"),
        masks("length compare in decoding", old="loaded = token < end", new="loaded = token <= end"),
        masks("unseen audio is loaded in decoding", old="tl.max(visible.to(tl.int32), axis=0) > 0", new="token < end"),
        masks("positions of query 0", old=".end - sizes.num_queries + row // GROUP", new=".end - sizes.num_queries"),
        masks("positions of query 0 in text", old="first_position + row // GROUP,", new="first_position + row * 0,"),
        offsets("decoded queries of head kv_head", old="kv_head * GROUP + row % GROUP", new="kv_head + row % GROUP"),
        offsets(
            "decoded queries' member ignored", old="kv_head * GROUP + row % GROUP", new="kv_head * GROUP + row * 0"
        ),
        offsets(
            "visible_from of row 0", old="readers.to(tl.int64)[:, None]", new="(readers * 0).to(tl.int64)[:, None]"
        ),
        offsets("visible_from of token 0", old="token.to(tl.int64)[None, :]", new="(token * 0).to(tl.int64)[None, :]"),
        offsets("reader not widened", old="readers.to(tl.int64) * query", new="readers * query", first="32_bits"),
        offsets("decoded head not widened", old="head.to(tl.int64) * query", new="head * query", first="32_bits"),
        offsets("decoded token not widened", old="(row // GROUP).to(tl.int64)", new="(row // GROUP)", first="32_bits"),
        offsets("decoded dim not widened", old="dim.to(tl.int64) * query", new="dim * query", first="32_bits"),
        offsets("parts of head 0", old="readers * sizes.num_kv_heads + kv_head", new="readers * sizes.num_kv_heads"),
        offsets("counters of head 0", old="place = batch * sizes.num_kv_heads + kv_head", new="place = batch"),
        offsets("merged LSE of member 0", old="+ member * sizes.num_queries + t", new="+ t"),
        offsets("output's member ignored", old="member.to(tl.int64) * out.head", new="member.to(tl.int64)"),
        offsets("text takes the audio's place", old="split += num_splits - num_shares", new="split += 0"),
        merge("merged sums without weights", old="total += weight * row_sum", new="total += row_sum"),
        merge("merged outputs without weights", old="weight[:, None] * tl.load(accs", new="tl.load(accs"),
        merge("merged by the first maximum", old="tl.maximum(total_max, row_max)", new="total_max"),
        merge("merged by -inf", old='tl.where(total_max == float("-inf"), 0.0, total_max)', new="total_max"),
        merge("merged rows divide by zero", old="tl.where(blind, 1.0, total)", new="total"),
        merge("merged LSE in base 2", old="total_max * LN_2 + tl.log(total)", new="total_max + tl.log2(total)"),
        bounds("rows that are not there are stored", old="row_max, mask=row_ok)", new="row_max, mask=row >= 0)"),
        bounds("rows that are not there are merged", old="lse, mask=row_ok)", new="lse, mask=row >= 0)"),
        bounds(
            "output beyond the last row", old="element_ty), mask=value_ok)", new="element_ty), mask=dim < HEAD_DIM)"
        ),
        bounds("a reader too many", old="(taken + 1) * num_rows <= BLOCK_M", new="taken * num_rows < BLOCK_M"),
        bounds("groups beyond the tile", old="num_queries * call.group <=", new="num_queries <="),
        shares(
            "shares rounded down", old="BLOCK_N), num_splits) * BLOCK_N", new="BLOCK_N) // num_splits, 1) * BLOCK_N"
        ),
        shares("shares overlap", old="tl.minimum(begin + per_split, end)", new="end"),
        shares("shares beyond the end", old="tl.minimum(begin + per_split, end)", new="begin + per_split"),
        shares("shares without their first key", old="first + split * per_split", new="first + split * per_split + 1"),
        shares("decoding begins late", old="- sizes.window + 1)", new="- sizes.window + 2)"),
        shares("decoding ignores text_start", old="first = text.start", new="first = 0"),
        shares("whole blocks beyond the share", file=KEYS, old=early, new="(tile_first + 1)"),
        shares("rows beyond 16 are not merged", old="sizes.num_queries * GROUP, MERGED_ROWS", new="1, MERGED_ROWS"),
        readers("merged too early", old="== num_splits - 1", new="== num_splits - 2"),
        readers("counters are not reset", old="tl.store(parts.arrived + place, 0)", new="tl.store(parts.arrived, 0)"),
        readers(
            "decoding from reader 1", old="next_reader(visibility, clip, 0,", new="next_reader(visibility, clip, 1,"
        ),
        readers("decoding skips a reader", old="batch + 1, sizes)", new="batch + 2, sizes)"),
        readers("arrives for the first reader", old="lane == reader * num_rows", new="lane == 0"),
    ]


def _packed() -> list[Mutant]:
    mutant = partial(Mutant, kind="packed rows", first="test_varlen")

    row, store = "+ row.first\n", "store_gradients(gradients, valid, dkey, dvalue, {}, {}.num_{},"
    text, audio = store.format("text", "text", "keys"), store.format("audio", "audio", "tokens")
    return [
        mutant("every row is the first", KEYS, "clamp(tl.load(cu_ptr + row), 0", "clamp(tl.load(cu_ptr), 0"),
        mutant("a row's end for its length", KEYS, "tl.load(cu_ptr + row + 1) - first", "tl.load(cu_ptr + row + 1)"),
        mutant("first token negative", KEYS, "clamp(tl.load(cu_ptr + row), 0", "clamp(tl.load(cu_ptr + row), -9"),
        mutant("a length beyond the tokens", KEYS, "- first, 0, total - first)", "- first, 0, total)"),
        mutant("a row's own visible_from", KEYS, "place = audio.first + token", "place = 0 * audio.first + token"),
        mutant("tokens of the first row", PRIMITIVES, "tl.cast(row.first, tl.int64) *", "0 *"),
        mutant("first token not widened", PRIMITIVES, "tl.cast(row.first, tl.int64) *", "row.first *", first="32_bits"),
        mutant("LSE of the first row", PRIMITIVES, row, "\n"),
        mutant(
            "LSE's heads by the longest row",
            PRIMITIVES,
            "member * sizes.text",
            "member * sizes.num_queries + 0 * sizes.text",
        ),
        mutant(
            "LSE's K/V heads by the longest row", PRIMITIVES, "GROUP * sizes.text_tokens", "GROUP * sizes.num_queries"
        ),
        mutant(
            "gradients of the next text row",
            BACKWARD,
            text,
            text.replace("text.num", "sizes.num"),
            first="any_order[index",
        ),
        mutant(
            "gradients of the next audio row",
            BACKWARD,
            audio,
            audio.replace("audio.num_tokens", "sizes.num_audio"),
            first="any_order[index",
        ),
        mutant(
            "rows beyond the text", FORWARD, "tile * BLOCK_M, text.num_queries", "tile * BLOCK_M, sizes.num_queries"
        ),
    ]


def _audio_kv() -> list[Mutant]:
    mutant = partial(Mutant, kind="audio_kv", tests=AUDIO_KV)

    return [
        mutant("no eps", STEPS, "square_sum / WIDTH + EPS", "square_sum / WIDTH", first="small"),
        mutant("sum for mean of squares", STEPS, "square_sum / WIDTH", "square_sum"),
        mutant("no norm offset", STEPS, "column_ok, 0.0) + OFFSET", "column_ok, 0.0)"),
        mutant("first row for all", STEPS, "place = tl.program_id(0).to(tl.int64) * WIDTH", "place = 0"),
        mutant(
            "columns beyond the row",
            STEPS,
            "    ok = column < WIDTH\n    values",
            "    ok = column < BLOCK\n    values",
        ),
        mutant("rows beyond the last", STEPS, "tl.minimum(program * ROWS + ROWS, num_rows)", "program * ROWS + ROWS"),
        mutant("weight's gradient of the last row", STEPS, "dweight += dout", "dweight = dout"),
        mutant("gradient without its projection", STEPS, "dout - normalised * mean", "dout"),
        mutant(
            "mean over the block",
            STEPS,
            "tl.sum(dout * normalised, axis=0) / WIDTH",
            "tl.sum(dout * normalised, axis=0) / BLOCK",
        ),
        mutant("gain left out of the gradient", STEPS, "        dout *= gain\n", ""),
        mutant("columns that do not turn", STEPS, "pair, pair + TURNED)", "pair, pair)"),
        mutant(
            "half of an odd head",
            STEPS,
            "half: tl.constexpr = (HEAD_DIM + 1) // 2",
            "half: tl.constexpr = HEAD_DIM // 2",
        ),
        mutant("columns beyond the head", STEPS, "low_ok & (high < HEAD_DIM)[None, :]", "low_ok"),
        mutant(
            "a row's own cosines",
            STEPS,
            "(row // num_tokens) * turn.batch + (row % num_tokens)",
            "(row % num_tokens)",
        ),
        mutant("turned the other way", STEPS, "lows * cos_low - highs * sin_low", "lows * cos_low + highs * sin_low"),
        mutant(
            "gradient turned the same way",
            STEPS,
            "highs * cos_high - lows * sin_low",
            "highs * cos_high + lows * sin_low",
        ),
        mutant(
            "lower sines for higher columns",
            STEPS,
            "lows * cos_low + highs * sin_high",
            "lows * cos_low + highs * sin_low",
        ),
        mutant("keys beyond the last row", STEPS, "row_ok = (row < num_rows)", "row_ok = (row < num_rows + BLOCK)"),
        mutant(
            "head norm over the lower half",
            STEPS,
            "tl.sum(lows * lows + highs * highs, axis=1)",
            "tl.sum(lows * lows, axis=1)",
        ),
        mutant("head's gradient of the first head", STEPS, "+ head * dkeys.head", "+ 0 * head"),
        mutant(
            "upstream gradient's columns side by side",
            STEPS,
            "low.to(tl.int64) * dkeys.dim",
            "low.to(tl.int64)",
        ),
        mutant(
            "norm's weight summed by one program",
            STEPS,
            "sums = dweight_ptr + program * HEAD_DIM",
            "sums = dweight_ptr",
        ),
        mutant(
            "gradient of keys as they left",
            PROJECTION,
            "finish_gradient(dkeys, raw, call)",
            "finish_gradient(dkeys, None if raw is None else dkeys.contiguous(), call)",
        ),
        mutant(
            "values by the keys' weight",
            PROJECTION,
            "linear(normalised, call.v_weight",
            "linear(normalised, call.k_weight",
        ),
        mutant(
            "only the values reach the states",
            PROJECTION,
            "torch.addmm(dnormalised, dvalues, call.v_weight)",
            "dvalues @ call.v_weight",
        ),
        mutant("bias before the layer's norm only", PROJECTION, "projected += bias.view(num_kv_heads, -1)", "pass"),
        mutant(
            "values not folded",
            PROJECTION,
            "torch.mul(layer.v_weight, gain, out=folded[1])",
            "folded[1].copy_(layer.v_weight)",
        ),
        mutant(
            "recipes keep the tensors",
            RECOMPUTE,
            "setattr(tensor, _ATTRIBUTE, (recipe, which))",
            "setattr(tensor, _ATTRIBUTE, (recipe, which)); recipe.kept = (key, value)",
        ),
        mutant("views of recipes pass", RECOMPUTE, "getattr(tensor._base, _ATTRIBUTE, None) is not None", "False"),
        mutant("autocast's copies pass", RECOMPUTE, "getattr(computed, name) is not tensor", "False"),
        mutant("values for keys", RECOMPUTE, "return made[which]", "return made[1 - which]"),
        mutant("versions are not looked at", RECOMPUTE, "tensor._version != self.versions[name]", "False"),
        mutant(
            "outer hooks are forgotten",
            RECOMPUTE,
            "return False, tensor if outer is None else outer[0](tensor)",
            "return False, tensor",
            first="hooks",
        ),
        mutant(
            "plain: turned the other way",
            PLAIN,
            "torch.cat([-high, low], dim=-1) * sin",
            "torch.cat([high, -low], dim=-1) * sin",
        ),
        mutant(
            "plain: gradient turned the same way",
            PLAIN,
            "torch.cat([high, -low], dim=-1), rest]",
            "torch.cat([-high, low], dim=-1), rest]",
        ),
    ]


MUTANTS = [
    *_masks(),
    *_offsets(),
    *_strides(),
    *_scale(),
    *_lengths_and_bounds(),
    *_online_softmax(),
    *_reductions(),
    *_skipped_blocks(),
    *_dispatch(),
    *_decode(),
    *_packed(),
    *_audio_kv(),
]

# Runs inside the mutant's pytest. Its exit code 70 is none of pytest's own.
PLUGIN = """
import json, os, pathlib, sys
import pytest

EXPECTED = pathlib.Path(__file__).resolve().parent / "palkernels"
REPORT = pathlib.Path(__file__).with_name("report.json")
report = {"modules": 0, "test": None, "failed": None, "errors": []}


def save():
    REPORT.write_text(json.dumps(report))


def check():
    loaded = [m for name, m in sys.modules.items() if name.split(".")[0] == "palkernels"]
    wrong = [m.__file__ for m in loaded if EXPECTED not in pathlib.Path(m.__file__).resolve().parents]
    if wrong or not loaded:
        pytest.exit(f"imported {wrong or 'nothing'}, not {EXPECTED}", returncode=70)
    report["modules"] = len(loaded)
    save()


def pytest_collection_modifyitems(items):
    first = os.environ["MUTANT_FIRST"]
    items.sort(key=lambda item: not first or first not in item.nodeid)


def pytest_collection_finish(session):
    check()


def pytest_runtest_logstart(nodeid, location):
    report["test"] = nodeid
    save()


def pytest_runtest_logfinish(nodeid, location):
    check()  # the kernels' modules too, which are loaded by the first call


def pytest_exception_interact(node, call):
    error, names = call.excinfo.value, []
    while error is not None:
        names.append(type(error).__name__)
        error = error.__cause__ or error.__context__
    record(node.nodeid, names)


def record(nodeid, names):
    if report["failed"] is None:
        report.update(failed=nodeid, errors=names)
        save()
"""


@dataclass(frozen=True)
class Result:
    """How a run ended; ``killed_by`` is None where every test passed."""

    killed_by: str | None
    how: str | None = None  # "failed", a signal's name, or "timeout"


def run(mutant: Mutant | None, package: Path) -> Result:
    """The tests on a copy of the package with the mutant in it; None: without."""
    label = "the package as it is" if mutant is None else f"mutant {mutant.name!r}"
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        copy = Path(folder).resolve()
        shutil.copytree(package, copy / "palkernels")
        (copy / "mutant_plugin.py").write_text(PLUGIN)
        if mutant is not None:
            target = copy / "palkernels" / mutant.file
            source = mutant.apply(target.read_text())
            compile(source, mutant.file, "exec")
            target.write_text(source)
        environment = os.environ | {
            "PYTHONPATH": str(copy),
            "PYTHONSAFEPATH": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            "MUTANT_FIRST": "" if mutant is None else mutant.first,
        }
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "mutant_plugin"]
        process = subprocess.Popen(
            [*command, *(dict.fromkeys(SELECTION + AUDIO_KV) if mutant is None else mutant.tests)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # so that a timeout ends the tests' own children too
        )
        try:
            output, _ = process.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            code = None
        else:
            code = process.returncode
        report_file = copy / "report.json"
        report = json.loads(report_file.read_text()) if report_file.is_file() else {}

    def fail(why: str) -> RuntimeError:
        return RuntimeError(f"{label}: {why}\n{output[-4000:]}")

    if not report.get("modules"):
        raise fail("the copy was not imported")
    if code == 0:
        return Result(None)
    if mutant is None:
        raise fail(f"every test must pass, got exit code {code}")
    if code is None:
        return Result(report["test"], "timeout")
    if code < 0:
        return Result(report["test"], signal.Signals(-code).name)
    if code != 1 or report["failed"] is None:
        raise fail(f"pytest must exit with 0 or 1, got {code}")
    if set(report["errors"]) & set(DOES_NOT_RUN):
        raise fail(f"it does not run: {', '.join(report['errors'])}")
    return Result(report["failed"], "failed")


def outcome(results: dict[str, Result]) -> list[dict[str, object]]:
    """What is committed: no times, no paths of this machine, in the table's order."""
    return [
        {
            "name": mutant.name,
            "class": mutant.kind,
            "file": f"palkernels/{mutant.file}",
            "old": mutant.old,
            "new": mutant.new,
            "outcome": "survived" if results[mutant.name].killed_by is None else "killed",
            "by": results[mutant.name].killed_by,
            "how": results[mutant.name].how,
        }
        for mutant in MUTANTS
        if mutant.name in results
    ]


def found_before() -> dict[str, Result]:
    """The committed results of mutants that are still as they were."""
    rows = json.loads(OUTCOME.read_text()) if OUTCOME.is_file() else []
    results = {row["name"]: Result(row["by"], row["how"]) for row in rows}
    results = {mutant.name: results[mutant.name] for mutant in MUTANTS if mutant.name in results}
    same = {row["name"] for row in rows if row in outcome(results)}
    return {name: result for name, result in results.items() if name in same}


def check_table() -> None:
    names = [mutant.name for mutant in MUTANTS]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"names must differ, got {', '.join(repeated)} more than once")
    for mutant in MUTANTS:
        mutant.apply((ROOT / "palkernels" / mutant.file).read_text())


def main() -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    check_table()
    chosen = [mutant for mutant in MUTANTS if mutant.name in sys.argv[1:]] if sys.argv[1:] else MUTANTS
    unknown = set(sys.argv[1:]) - {mutant.name for mutant in MUTANTS}
    if unknown:
        raise ValueError(f"mutants must be in the table, got {', '.join(sorted(unknown))}")

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    results = {} if chosen is MUTANTS else found_before()
    survived = failed = 0

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False)

    with (
        tempfile.TemporaryDirectory(prefix="mutants-") as folder,
        Progress(*columns, console=console) as progress,
        ThreadPoolExecutor(AT_ONCE) as pool,
    ):
        package = Path(folder) / "palkernels"  # as it is now: a long run must not see later edits
        shutil.copytree(ROOT / "palkernels", package, ignore=shutil.ignore_patterns("__pycache__"))
        task = progress.add_task("mutants", total=len(chosen) + 1)
        futures = {pool.submit(run, mutant, package): mutant for mutant in (None, *chosen)}
        try:
            for future in as_completed(futures):
                progress.advance(task)
                mutant = futures[future]
                try:
                    result = future.result()
                except RuntimeError as error:
                    if mutant is None:  # then no result means anything
                        raise
                    say(f"error: {error}")
                    failed += 1
                    continue
                if mutant is not None:
                    results[mutant.name] = result
                    write(outcome(results))
                    if result.killed_by is None:
                        say(f"survived: {mutant.name}")
                        survived += 1
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    say(f"{len(chosen)} mutants, {len(chosen) - survived - failed} killed, {survived} survived, {failed} did not run")
    sys.exit(1 if survived or failed else 0)


def write(rows: list[dict[str, object]]) -> None:
    part = OUTCOME.with_suffix(".part")
    part.write_text(json.dumps(rows, indent=1) + "\n")
    part.replace(OUTCOME)


if __name__ == "__main__":
    try:
        main()
    except (RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")
