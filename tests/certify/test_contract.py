"""Every router of ``configs/router`` keeps every promise: a new file is found by itself."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import routerlab as rl
from routerlab.certify.certificate import CHECKS, run_check
from routerlab.certify.contract import require_finite
from routerlab.certify.probes import D_MODEL, SIZES, Probe, probe
from routerlab.certify.subject import Subject

ROUTERS = rl.available("router")
VARIANTS = {  # what a router's own file does not switch on
    "ssr, plan on every step": ("selective_sinkhorn", "router.p=1.0"),
    "sinkhorn, unrolled": ("sinkhorn", "router.ot_grad=unroll"),
    "thresholds": ("expert_choice", "router.inference=thresholds"),
    "percentile of the batch": ("dynamoe", "router.mode=percentile_batch"),
    "absolute threshold": ("dynamoe", "router.mode=absolute"),
    "cumulative": ("dynamoe", "router.mode=cumulative"),
    "one draw a sequence": ("subset_sampling", "router.granularity=sequence"),
    "bip": ("token_choice", "balancer=bip"),
}


@cache
def subject(name: str) -> Subject:
    """Composing a config takes half a second: once for all checks."""
    router, *words = VARIANTS.get(name, (name,))
    return Subject.of(router, words)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", [*ROUTERS, *VARIANTS])
def test_contract(name: str, check: str) -> None:
    result = run_check(check, CHECKS[check], subject(name))
    assert result.status in ("pass", "declared"), f"{name}: {result.reason}"


@pytest.mark.parametrize("name", ROUTERS)
@settings(deadline=None, max_examples=10, derandomize=True)
@given(
    size=st.sampled_from(SIZES),
    values=st.lists(st.sampled_from([-1e4, -1.0, -1e-20, 0.0, 1e-3, 1.0, 30.0, 1e4]), min_size=1),
    training=st.booleans(),
)
def test_finite(name: str, size: tuple[int, int], values: list[float], training: bool) -> None:
    """Any pattern of large, small and equal values."""
    base = probe(*size)
    count = len(base.x) * D_MODEL
    x = torch.tensor((values * count)[:count]).view(-1, D_MODEL)
    require_finite(subject(name).router(training), Probe(x, base.context), f"for {values}")
