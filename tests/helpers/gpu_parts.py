"""Parts of a GPU suite that end in every way a process can end."""

import os
import sys
import time


def works(bench, name):
    return {"tokens": bench.sizes.tokens_per_step}


def raises(bench, name):
    raise RuntimeError("no such kernel")


def aborts(bench, name):
    """As a failed assertion on the device or in a C++ library does."""
    print("CUDA error: an illegal memory access was encountered", file=sys.stderr, flush=True)
    os.abort()


def hangs(bench, name):
    time.sleep(600)
