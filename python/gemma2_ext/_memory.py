"""Memory for what decoding reads whole, once a token: weights and caches."""

from __future__ import annotations

import mmap
from contextlib import suppress

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20


def map_huge_pages(nbytes: int, what: str) -> tuple[mmap.mmap, int]:
    """An anonymous mapping, in huge pages where the system has them, not yet touched.

    Huge pages spare address translation, which from pages of 4 KiB may take a third of the time.

    Args:
        nbytes: room that is needed behind the offset.
        what: it is for, in an error.

    Returns:
        The mapping and the offset in it where a huge page begins. Tensors over it keep it alive.

    Raises:
        MemoryError: the system refuses the mapping.
    """
    try:
        memory = mmap.mmap(-1, nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(
            f"the system refuses {nbytes / 2**30:.2f} GiB for {what}: {error.strerror}"
        ) from None
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory, -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % HUGE_PAGE


def empty_in_huge_pages(nbytes: int, what: str) -> Tensor:
    """(nbytes,) uint8, uninitialized, in a mapping of its own; nbytes > 0, errors as above."""
    memory, begin = map_huge_pages(nbytes, what)
    return torch.frombuffer(memory, dtype=torch.uint8, count=nbytes, offset=begin)
