"""The stand-in for a GPU: what is launched on it. In processes of its own, as it changes torch."""

import json
import subprocess
import sys

from palkernels.bench.instruments import stand_in


def child(script):
    """Run a script in the stand-in's environment, and return what it prints as JSON."""
    command = [sys.executable, "-P", "-W", "error:CUDA initialization", "-c", script]
    environment = stand_in.child_environment()
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


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


ENTER = """
import json, os, sys
import torch
from palkernels import devices
from palkernels.bench.errors import UserError
from palkernels.bench.instruments import stand_in
{before}
try:
    stand_in.enter()
    result = "entered"
except UserError as error:
    result = str(error)
print(json.dumps([result, devices.kernel_device]))
"""


REFUSED = {
    "torch.cuda.is_available = lambda: True": "the stand-in must be entered without a GPU",
    "torch.cuda._initialized = True": "the stand-in must be entered before torch.cuda is used",
    "os.environ['TRITON_INTERPRET'] = '1'": "the stand-in must be entered without TRITON_INTERPRET=1",
    "sys.modules['triton'] = None": "the stand-in must have triton, got: ",
}
# Each in a process of its own, which has what takes long to import.
EACH = """
import json, os, sys
import torch
from palkernels.bench.instruments import stand_in
print("[", flush=True)
for number, script in enumerate({scripts!r}):
    if number:
        print(",", flush=True)
    if os.fork() == 0:
        exec(script, {{}})
        sys.stdout.flush()
        os._exit(0)
    os.wait()
print("]")
"""


def test_refused():
    scripts = [ENTER.format(before=before) for before in REFUSED]
    results = child(EACH.format(scripts=scripts))
    assert len(results) == len(REFUSED)
    for (result, kernel_device), message in zip(results, REFUSED.values(), strict=True):
        assert result.startswith(message)
        assert kernel_device == "cuda"


def test_another_driver_is_not_mistaken_for_it(tmp_path):
    """The C launcher would call whatever libcuda.so.1 the process has loaded first."""
    (tmp_path / "other.c").write_text("int cuInit(void) { return 100; }")
    library = tmp_path / "libcuda.so.1"
    command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-o", library, tmp_path / "other.c"]
    subprocess.run(command, check=True)
    before = f"import ctypes\nctypes.CDLL({str(library)!r}, mode=ctypes.RTLD_GLOBAL)"
    result, kernel_device = child(ENTER.format(before=before))
    assert (result, kernel_device) == ("no libcuda.so.1 must be loaded before the stand-in's, got one", "cuda")


def test_entered_twice_and_asked_as_an_h200():
    script = ENTER.format(before="stand_in.enter()") + (
        "assert torch.cuda.get_device_capability(torch.zeros(1).device) == (9, 0)\n"
        "assert torch.cuda.get_device_properties(1).multi_processor_count == 132\n"
        "assert torch.cuda.device_count() == stand_in.DEVICES and torch.cuda.is_available()\n"
        "torch.manual_seed(0); torch.cuda.synchronize(); torch.cuda.empty_cache()\n"
        "torch.cuda.set_device(1)\n"
        "assert (stand_in.device, torch.cuda.current_device(), torch._C._cuda_getCurrentRawStream(1)) == (1, 1, 0)\n"
    )
    assert child(script) == ["entered", "cpu"]
