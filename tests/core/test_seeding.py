"""Seeds are pure functions of what they are for."""

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from routerlab.core.seeding import stable_seed


def test_value_is_the_first_63_bits_of_a_blake2b_digest() -> None:
    digest = hashlib.blake2b(b"3/train/0", digest_size=8).hexdigest()
    assert stable_seed(3, "train", 0) == int(digest, 16) // 2


@given(st.lists(st.integers(), min_size=1, max_size=4), st.integers(1, 10**9))
def test_same_parts_same_seed_other_parts_other_seed(parts: list[int], step: int) -> None:
    seed = stable_seed(*parts)
    assert 0 <= seed < 2**63
    assert seed == stable_seed(*parts)
    assert seed != stable_seed(*parts, step)
    assert seed != stable_seed(parts[0] + step, *parts[1:])


def test_parts_do_not_run_together() -> None:
    assert stable_seed(1, 23) != stable_seed(12, 3)
