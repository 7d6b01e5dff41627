"""Memory by PyTorch's own record of each allocation and release: a count that is independent of the project's."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile


def peak_by_the_profiler(work: Callable[[], Any], folder: Path) -> int:
    """Bytes of `work` and its result that PyTorch's CPU allocator had handed out at most, inside of operators too."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        kept = work()
    trace = folder / "trace.json"
    recorded.export_chrome_trace(str(trace))
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
    live: dict[int, int] = {}  # by address: what was there before may be freed meanwhile, and is none of work's
    peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        address, size = event["args"]["Addr"], event["args"]["Bytes"]
        if size > 0:
            live[address] = size
        else:
            live.pop(address, None)
        peak = max(peak, sum(live.values()))
    del kept
    return peak
