"""The fake GPU behaves as a GPU does where `make gpu` would notice: in a process of its own, which it is given."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from bench.lib.steps import environment_of
from tests.helpers.fake_gpu import processes

# Each is a line that must hold, or a comment on those after it.
HOLDS = """
x, host = torch.randn(3, 4, device="cuda"), torch.randn(3, 4)
assert torch.cuda.is_available() and x.is_cuda and str(x.to("cuda").device) == str(host.cuda().device) == "cuda:0"
assert torch.equal((x @ x.t()).cpu(), x.cpu() @ x.cpu().t())
# Views share their storage, and what is written to one is seen in the other.
x[1] = 7
assert x.t()[2, 1].item() == 7 and x[1:].untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
assert torch.nn.Linear(4, 2).cuda()(x).shape == (3, 2)
# A tensor of the host among those of the device is refused, but for numbers, copies and indices.
assert raises(lambda: x + host, "same device")
assert (x + torch.tensor(1.0)).is_cuda and x[torch.tensor([0, 2])].shape == (2, 4) and x.copy_(host).is_cuda
# A graph computes again, from the numbers that are there then.
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    assert torch.cuda.is_current_stream_capturing()
    y = x @ x.t() + 1
x.fill_(2)
graph.replay()
assert y.cpu().eq(17).all()
# What torch 2.11 refuses while a graph is captured: a copy from memory that is not pinned; and to ask for a number.
assert raises(lambda: captured(lambda: torch.tensor(0.0, device="cuda")), "unless the CPU tensor is pinned")
assert raises(lambda: captured(lambda: x.sum().item()), "capturing")
pinned = torch.empty(3, pin_memory=True).fill_(5)
assert captured(lambda: pinned.to("cuda", non_blocking=True)) is None
# Kernels are interpreted on the same memory, and round float32 to bfloat16 to the nearest.
out = torch.empty(16, dtype=torch.bfloat16, device="cuda")
halved[(1,)](torch.full((16,), 1 + 2**-8 + 2**-9, device="cuda"), out)
assert out.cpu().eq(1 + 2**-7).all()
"""
BEFORE = """
import torch, triton
import triton.language as tl

@triton.jit
def halved(source, target):
    place = tl.arange(0, 16)
    tl.store(target + place, tl.load(source + place).to(tl.bfloat16))

def raises(call, words):
    try:
        call()
    except RuntimeError as error:
        return words in str(error)

def captured(call):
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        call()
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("gpu")
    processes.build(place)
    return place


def test_it_behaves_as_a_gpu_does(place, monkeypatch) -> None:
    for name, value in processes.environment(place).items():
        monkeypatch.setenv(name, value)
    program = place / "holds.py"
    program.write_text(textwrap.dedent(BEFORE + HOLDS))
    environment = environment_of(dict(processes.os.environ))
    done = subprocess.run([sys.executable, str(program)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
