"""Stateless randomness: a seed is a pure function of what it is for."""

import hashlib


def stable_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on ``parts`` alone: equal on every machine and every run."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
