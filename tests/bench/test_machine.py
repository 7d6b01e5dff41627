"""Memory limits, and telling one failure from another."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from palkernels.bench import machine
from palkernels.bench.cli import main


def test_what_counts_as_out_of_memory() -> None:
    assert machine.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert machine.is_out_of_memory(MemoryError())
    allocator = "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate"
    assert machine.is_out_of_memory(RuntimeError(allocator))
    assert not machine.is_out_of_memory(RuntimeError("shapes do not fit"))
    assert not machine.is_out_of_memory(ValueError("out of memory"))


def test_an_allocation_beyond_the_limit_raises_and_the_limit_goes() -> None:
    """In a process of its own: a limit that stayed would break the tests after this one."""
    code = """
import resource, torch
from palkernels.bench import machine
before = resource.getrlimit(resource.RLIMIT_DATA)
machine.available_bytes = lambda: 512 * 2**20
with machine.memory_limit() as limit:
    assert resource.getrlimit(resource.RLIMIT_DATA)[0] == limit
    small = torch.empty(64 * 2**20, dtype=torch.uint8)
    try:
        torch.empty(2**30, dtype=torch.uint8)
        raise SystemExit("the limit did not hold")
    except (RuntimeError, MemoryError) as error:
        assert machine.is_out_of_memory(error), error
assert resource.getrlimit(resource.RLIMIT_DATA) == before
torch.empty(2**30, dtype=torch.uint8)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_limit_set_by_the_user_stays_the_lower_one() -> None:
    code = """
import resource
from palkernels.bench import machine
used = machine._proc_bytes("/proc/self/status", "VmData")
own = used + 2**29
resource.setrlimit(resource.RLIMIT_DATA, (own, resource.getrlimit(resource.RLIMIT_DATA)[1]))
machine.available_bytes = lambda: 2**40
with machine.memory_limit() as limit:
    assert limit == own, (limit, own)
assert resource.getrlimit(resource.RLIMIT_DATA)[0] == own
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_control_groups_of_both_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tightest of the group and those above it counts, and file pages in it count as free."""
    for folder, limit, used in (("a", 1000, 400), ("a/b", "max", 300)):
        group = tmp_path / "sys/fs/cgroup" / folder
        group.mkdir(parents=True)
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text(f"{used}\n")
        (group / "memory.stat").write_text("anon 1\ninactive_file 50\n")
    old = tmp_path / "sys/fs/cgroup/memory/c"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text("900\n")
    (old / "memory.usage_in_bytes").write_text("100\n")
    (old / "memory.stat").write_text("total_inactive_file 10\n")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("4:memory:/c\n3:cpu,cpuacct:/c\n0::/a/b\n")
    (tmp_path / "proc/meminfo").write_text("MemTotal: 16 kB\nMemAvailable: 8 kB\n")
    monkeypatch.setattr(machine, "Path", lambda path: Path(str(tmp_path) + path))
    assert sorted(machine._control_groups()) == [650, 810]
    assert machine.available_bytes() == 650


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["doctor"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for name in ("palkernels", "python", "torch", "triton", "transformers", "numpy", "torchaudio", "soundfile"):
        assert f"\n  {name} " in text
    assert torch.__version__.split("+")[0] in text
    assert machine.cpu_name() in text
    for impl in ("reference", "sdpa", "triton"):
        assert f"cpu     {impl}" in text
    assert "reference  float16, bfloat16, float32, float64" in text
    if not torch.cuda.is_available():
        assert "no GPU: " in text


def test_doctor_says_which_forward_kernel_is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from palkernels.bench import doctor
    from palkernels.kernels.gluon import choice

    assert "\n  the Triton kernel (PALKERNELS_GLUON=1 switches the Gluon kernel on)\n" in doctor.diagnosis()
    monkeypatch.setattr(choice, "ON", True)
    assert "\n  the Gluon kernel where it takes a call, otherwise" in doctor.diagnosis()
    monkeypatch.setattr(choice, "has_gluon", lambda: False)
    assert "but triton has no triton.experimental.gluon\n" in doctor.diagnosis()


def test_doctor_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from palkernels.bench import doctor

    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "no-such-package"))
    assert "no-such-package  not installed" in doctor.diagnosis()
