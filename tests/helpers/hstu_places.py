"""A kernel that notes which part of HSTU's attention each of its programs would compute."""

import triton
import triton.language as tl

from gpsd_dist.model.ops.hstu_triton import _place


@triton.jit
def note_places(place_P3, H: tl.constexpr, LAST_FIRST: tl.constexpr):
    """Writes (request, head, block) of every program, in the order in which programs start."""
    request, head, block = _place(H, LAST_FIRST)
    first = place_P3 + 3 * (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0))
    tl.store(first, request)
    tl.store(first + 1, head)
    tl.store(first + 2, block)
