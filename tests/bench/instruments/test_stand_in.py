"""The stand-in for a GPU: what is launched on it. In processes of its own, as it changes torch."""

import json
import subprocess
import sys

from palkernels.bench.instruments import stand_in


def child(script, **environment):
    """Run a script, and return what it prints as JSON; of one that failed the process."""
    command = [sys.executable, "-P", "-W", "error:CUDA initialization", "-c", script]
    environment = stand_in.child_environment() | environment
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    return json.loads(done.stdout) if done.returncode == 0 else done


LAUNCHES = """
import json
from palkernels.bench.instruments import stand_in
stand_in.enter()
import torch
from palkernels import audio_kv, lal_attention

def inputs(queries, **options):
    shapes = [(1, 4, queries, 64), *[(1, 2, 16, 64)] * 2, *[(1, 2, 20, 64)] * 2]
    return [torch.zeros(shape, dtype=torch.bfloat16, **options) for shape in shapes]

found = {}
def count(name, call):
    before = stand_in.launches()
    result = call()
    found[name] = [launch.kernel for launch in stand_in.launched(before)]
    return result

count("forward", lambda: lal_attention(*inputs(16)))
count("decode", lambda: lal_attention(*inputs(1)))
out = count("forward with gradients", lambda: lal_attention(*inputs(16, requires_grad=True)))
count("backward", lambda: out.sum().backward())
states, norm, weight = (torch.zeros(shape, dtype=torch.bfloat16) for shape in ((1, 5, 64), 64, (64, 64)))
count("audio_kv", lambda: audio_kv(states, norm, weight, weight, num_kv_heads=1, eps=1e-5))
tensors = inputs(16)
lal_attention(*tensors)
parameters = stand_in.launched()[-1].parameters
found["parameters"] = [parameters.index(tensor.data_ptr()) for tensor in tensors]
found["strides"] = list(parameters[1:4])
stand_in.stream = 7
lal_attention(*inputs(1))
with torch.cuda.stream(torch.cuda.Stream()):
    lal_attention(*inputs(1))
    other = torch.cuda.current_stream().cuda_stream
found["streams"] = [launch.stream for launch in stand_in.launched()[-2:]] == [7, other] and other != 7
found["back"] = stand_in.stream
with torch.cuda.device(1):
    found["device"] = torch.cuda.current_device()
stand_in.capturing = True
found["capturing"] = torch.cuda.is_current_stream_capturing()
print(json.dumps(found))
"""


def test_what_is_launched():
    found = child(LAUNCHES)
    assert found == {
        "forward": ["forward_kernel"],
        "decode": ["decode_kernel"],
        "forward with gradients": ["forward_kernel"],
        "backward": ["query_gradient_kernel", "key_gradient_kernel"],
        "audio_kv": ["normalise_kernel"],
        "parameters": [0, 4, 8, 12, 16],  # each with its strides, but for the last, which is 1
        "strides": [4 * 16 * 64, 16 * 64, 64],
        "streams": True,
        "back": 7,
        "device": 1,
        "capturing": True,
    }
