"""Every check lets a good router pass, fails for one that breaks its promise, and says why."""

import pytest
from torch import nn

from routerlab.certify.certificate import CHECKS, certify, run_check
from routerlab.certify.subject import Subject
from routerlab.routers.token_choice import TokenChoice
from tests.certify import broken

FAILURES = [
    ("record", broken.OneExpertTwice, "occurs twice"),
    ("record", broken.NoSuchExpert, "expert_indices are out of range"),
    ("record", broken.ProbabilitiesOfAHalf, "no distributions"),
    ("record", broken.DispatchesPadding, "padding is dispatched"),
    ("record", broken.ForgetsValid, "which tokens are valid"),
    ("record", broken.HalfPrecision, "router_logits is torch.bfloat16"),
    ("finite", broken.Overflows, "router_probs not finite for logits of 100"),
    ("finite", broken.NoGradientAtZero, "gradient of the tokens not finite for zeros"),
    ("weights", broken.NegativeWeights, "negative"),
    ("counts", broken.SaysThree, "16 requests of 8 tokens with top_k=3"),
    ("counts", broken.ExpertByExpert, "rows are not K for each token"),
    ("token order", broken.PrefersEarlyTokens, "changed with the order"),
    ("expert labels", broken.PrefersExpertZero, "changed with expert numbers"),
    ("expert labels", broken.ExpertsTie, "changed with expert numbers"),
    ("state", broken.Counts, "count changed in forward in training"),
    ("state", broken.UpdatesWeights, "update changed the parameter gate.weight"),
    ("autocast", broken.PlainLinear, "rounded"),
    ("autocast", broken.HalfPrecision, "torch.bfloat16"),
    ("gradient", broken.NoGradient, "no parameter gets a gradient"),
    ("gradient", broken.IdleParameter, "no gradient reaches idle"),
    ("padding", broken.AveragesPadding, "changed with what padding holds"),
    ("padding", broken.CountsPadding, "changed when padded further"),
    ("round trip", broken.LosesState, "not restored"),
    ("dispatch", broken.ExpertByExpert, "the output differs"),
    ("deterministic", broken.GlobalDraws, "global generator in training"),
    ("deterministic", broken.HiddenCounter, "differ between two equal calls"),
    ("no context", broken.NeedsContext, "AttributeError"),
    ("leak: router, eval", broken.LooksAhead, "changing later tokens moves"),
    ("leak: router, eval", broken.LooksAround, "changing another sequence moves"),
    ("leak: router, eval", broken.AveragesPadding, "padding moves real tokens"),
    ("leak: router, train", broken.LooksAheadInTraining, "though causal_training is True"),
    ("leak: router, train", broken.LooksAheadNowAndThen, "though causal_training is True"),
    ("leak: model, eval", broken.LooksAhead, "layers 00, 01, 02 and outputs at 0 to 6"),
    ("leak: model, eval", broken.LooksAround, "another sequence moves"),
    ("leak: model, eval", broken.AveragesPadding, "changing padding moves"),
    ("leak: model, train", broken.LooksAheadInTraining, "though causal_training is True"),
]
DECLARED = [
    ("token order", broken.SaysThatPlaceMatters, "order_dependent"),
    ("token order", broken.SeededDraws, "random in evaluation"),
    ("expert labels", broken.SeededDraws, "random in evaluation"),
    ("expert labels", broken.NoParameters, "no weights"),
    ("expert labels", broken.SaysThatExpertsTie, "ties: the expert number decides"),
    ("gradient", broken.NoParameters, "no parameters"),
    ("deterministic", broken.SeededDraws, "random in evaluation"),
    ("no context", broken.SeededDraws, "draws from context.seed: pass a RoutingContext"),
    ("leak: router, eval", broken.SaysThatItLooksAhead, "changing later tokens moves 7 tokens"),
    ("leak: router, train", broken.SaysThatTrainingLooksAhead, "causal_training is False"),
    ("leak: model, eval", broken.SaysThatItLooksAhead, "layers 00, 01, 02 and outputs at 0 to 6"),
    ("leak: model, train", broken.SaysThatItLooksAhead, "changing the last token moves"),
]


@pytest.mark.parametrize(("check", "router", "reason"), FAILURES)
def test_a_broken_promise_fails_its_check(check: str, router: type[nn.Module], reason: str) -> None:
    result = run_check(check, CHECKS[check], Subject(router.__name__, router))
    assert (result.status, reason in result.reason) == ("fail", True), result


def test_every_check_is_shown_able_to_fail() -> None:
    assert {check for check, _, _ in FAILURES} == set(CHECKS)


@pytest.mark.parametrize(("check", "router", "reason"), DECLARED)
def test_what_is_declared_is_no_failure(check: str, router: type[nn.Module], reason: str) -> None:
    result = run_check(check, CHECKS[check], Subject(router.__name__, router))
    assert (result.status, reason in result.reason) == ("declared", True), result


@pytest.mark.parametrize("check", CHECKS)
def test_a_good_router_passes(check: str) -> None:
    result = run_check(check, CHECKS[check], Subject("good", broken.Good))
    assert (result.status, result.reason) == ("pass", "")


@pytest.mark.parametrize(
    ("router", "failed", "causal"),
    [
        (broken.SaysThatItLooksAhead, [], "no"),
        (broken.SaysThatTrainingLooksAhead, [], "training looks ahead"),
        (broken.SeededDraws, [], "yes"),
        (broken.NegativeWeights, ["weights"], "yes"),
        (broken.CountsPadding, ["padding"], "yes"),
        (broken.LosesState, ["expert labels", "round trip"], "yes"),
    ],
)
def test_other_checks_are_not_disturbed(
    router: type[nn.Module], failed: list[str], causal: str
) -> None:
    certificate = certify(Subject("it", router))
    assert (certificate.failed, certificate.causal) == (failed, causal), certificate.results
    assert certificate.as_json()["passed"] is not bool(failed)


def test_a_router_that_cannot_be_built_fails() -> None:
    def refuse(**sizes: int) -> nn.Module:
        raise ValueError("num_experts=8: must be 9")

    certificate = certify(Subject("refused", refuse))
    assert certificate.failed == ["is built"]
    assert "must be 9" in certificate.results[0].reason


def test_a_part_of_a_router_speaks_for_it() -> None:
    """A balancer that looks ahead in training is enough."""

    def build(**sizes: int) -> nn.Module:
        router = broken.Good(**sizes)
        router.add_module("part", broken.SaysThatTrainingLooksAhead(**sizes))
        return router

    assert certify(Subject("it", build)).causal == "training looks ahead"


def test_a_queue_is_caught_if_it_denies_it() -> None:
    """Second choices wait for all first choices, and so for later tokens."""

    class Denying(TokenChoice):
        causal_training = True

    def build(**sizes: int) -> nn.Module:
        return Denying(**sizes, top_k=2, capacity_factor=1.0)

    for check in ("leak: router, train", "leak: model, train"):
        assert run_check(check, CHECKS[check], Subject("it", build)).status == "fail"
    assert run_check("state", CHECKS["state"], Subject("it", build)).status == "pass"


@pytest.mark.parametrize(
    ("words", "causal", "more"),
    [
        (["balancer=expert_bias"], "yes", set()),
        (["balancer=bip", "balancer.midpoint=true"], "training looks ahead", set()),
        (["balancer=bip", "balancer.mode=causal"], "yes", set()),
        # a price is the surplus of a token that then ties; rounding must not look like a leak
        (
            ["balancer=bip", "balancer.mode=online", "balancer.iterations=1"],
            "yes",
            {"token order", "expert labels"},
        ),
    ],
)
def test_balancers(words: list[str], causal: str, more: set[str]) -> None:
    composed = Subject.of("token_choice", words)

    def build(**sizes: int) -> nn.Module:
        router = composed.build(**sizes)
        router.ties = "balancer.mode=online" in words
        return router

    certificate = certify(Subject("it", build))
    assert (certificate.failed, certificate.causal) == ([], causal), certificate.results
    ahead = {"leak: router, train", "leak: model, train"}
    declared = {result.check for result in certificate.results if result.status == "declared"}
    assert declared == more | (ahead if causal != "yes" else set())


def test_what_is_certified_is_not_touched() -> None:
    """The subject builds routers; torch's generator is where it was."""
    import torch

    before = torch.get_rng_state()
    certify(Subject("good", broken.Good))
    assert torch.equal(before, torch.get_rng_state())
