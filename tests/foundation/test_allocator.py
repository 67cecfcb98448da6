"""Memory that was freed is kept for the next large tensor, where the C library is glibc."""

import os
import platform
import subprocess
import sys

import pytest

# Whether a tensor of 64 MiB lies in the heap, where what is freed stays, or in a mapping of its own.
PLACE = """
from stages.foundation.allocator import keep_freed_memory
keep_freed_memory()
import torch
at = torch.empty(1 << 24).data_ptr()
lines = [line.split() for line in open("/proc/self/maps")]
spans = [map(lambda end: int(end, 16), line[0].split("-")) for line in lines if line[-1] == "[heap]"]
print(any(start <= at < stop for start, stop in spans))
"""


def lies_in_the_heap(**settled):
    theirs = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", PLACE], env=theirs | settled, capture_output=True, text=True, check=True, timeout=120
    )
    return {"True\n": True, "False\n": False}[done.stdout]


def is_new_glibc():
    name, version = platform.libc_ver()
    return name == "glibc" and tuple(map(int, version.split("."))) >= (2, 35)


@pytest.mark.skipif(not is_new_glibc(), reason="the C library is not glibc 2.35 or later")
def test_it_is_kept_unless_the_user_has_settled_it():
    assert lies_in_the_heap()
    assert not lies_in_the_heap(MALLOC_MMAP_THRESHOLD_="65536")
