"""What the caches of AOTAutograd and Inductor must know of us beside a graph: what our operators are made of."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import torch


def cache_key_tag() -> str:
    """The user's tag, and our kernels' sources: AOTAutograd's cache knows an operator by its name alone."""
    return f"{torch.compiler.config.cache_key_tag} fused_post {_hash_of_kernels()}".lstrip()


@functools.cache
def _hash_of_kernels() -> str:
    sources = sorted((Path(__file__).parent / "kernels").glob("*.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
