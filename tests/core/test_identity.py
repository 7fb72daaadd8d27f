"""Which configs are the same experiment."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routerlab.core.config import choices, compose
from routerlab.core.identity import PLACES, flat, identity, scientific, within

SAME = [
    ["run_dir=/tmp/a"],
    ["group=night"],
    ["paths.output_dir=/elsewhere"],
    ["launcher=slurm", "resources=cpu"],
    ["logger=[]"],
    ["callback.checkpoint.every_n_steps=7"],
    ["trainer.devices=2", "trainer.strategy=ddp"],
    ["data.cache_dir=/elsewhere", "trace_sequences=0", "name=other"],
    ["router=token_choice"],  # said, and the default
    ["router.top_k=2"],
]
OTHER = [
    ["seed=1"],
    ["router=hash"],
    ["router.top_k=1"],
    ["trainer.max_steps=801"],
    ["trainer.precision=bf16-mixed"],
    ["data.batch_size=8"],
    ["loss=[]"],
    ["loss.load_balancing.weight=0.02"],
]


@pytest.mark.parametrize("words", SAME, ids=str)
def test_where_a_run_lies_and_computes_is_not_what_it_is(words: list[str]) -> None:
    base = ["experiment=quickstart"]
    assert identity(compose(*base, *words)) == identity(compose(*base))


def test_whatever_changes_the_numbers_is_another_experiment() -> None:
    found = {identity(compose("experiment=quickstart", *words)) for words in [[], *OTHER]}
    assert len(found) == 1 + len(OTHER)
    assert all(len(digits) == 10 and int(digits, 16) >= 0 for digits in found)


@given(
    st.recursive(
        st.integers() | st.text(max_size=3) | st.lists(st.integers(), max_size=2),
        lambda inner: st.dictionaries(st.sampled_from("abc"), inner, min_size=1, max_size=3),
        max_leaves=8,
    )
)
def test_a_flat_config_has_every_leaf_once(tree: object) -> None:
    def leaves(node: object) -> int:
        return sum(map(leaves, node.values())) if isinstance(node, dict) else 1

    found = flat(tree)
    assert len(found) == leaves(tree)
    assert not any(isinstance(value, dict) for value in found.values())


def test_a_place_is_a_key_or_what_lies_below_it() -> None:
    assert within("logger.wandb.project", PLACES)
    assert within("group", PLACES)
    assert not within("grouped", PLACES)
    assert not within("trainer.devices_more", PLACES)
    assert scientific({"a": {"b": 1}, "run_dir": "x", "paths": {"c": 2}}) == {"a.b": 1}


def test_the_chosen_files_are_named() -> None:
    found = choices(["experiment=remix_quickstart", "data=sarcasm"])
    assert found["adapter"] == "remix"
    assert found["data"] == "sarcasm"
    assert found["router"] == "subset_sampling"  # which the adapter's file chose
    assert choices([])["router"] == "token_choice"
