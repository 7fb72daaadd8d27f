"""All checks of a router, and the card that says how it did."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from routerlab.certify import contract, laws
from routerlab.certify.leaks import check_model_leak, check_router_leak
from routerlab.certify.subject import Subject, declares

Check = Callable[[Subject], str | None]

CHECKS: dict[str, Check] = {
    "record": contract.check_record,
    "finite": contract.check_finite,
    "weights": contract.check_weights,
    "counts": contract.check_counts,
    "token order": laws.check_token_order,
    "expert labels": laws.check_expert_labels,
    "state": laws.check_state,
    "autocast": laws.check_autocast,
    "gradient": laws.check_gradient,
    "padding": laws.check_padding,
    "round trip": laws.check_round_trip,
    "dispatch": laws.check_dispatch,
    "deterministic": laws.check_deterministic,
    "no context": laws.check_no_context,
    "leak: router, eval": partial(check_router_leak, training=False),
    "leak: router, train": partial(check_router_leak, training=True),
    "leak: model, eval": partial(check_model_leak, training=False),
    "leak: model, train": partial(check_model_leak, training=True),
}
COLOURS = {"pass": "green", "fail": "bold red", "declared": "yellow"}


@dataclass(frozen=True, slots=True)
class Result:
    """One check: ``pass``, ``fail`` with the reason, or what is ``declared`` to be otherwise."""

    check: str
    status: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Certificate:
    """What became of a router's checks. ``causal``: yes, ``training looks ahead`` or no."""

    router: str
    causal: str
    results: list[Result]

    @property
    def failed(self) -> list[str]:
        """Names of the checks that failed."""
        return [result.check for result in self.results if result.status == "fail"]

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"passed": not self.failed}


def certify(subject: Subject) -> Certificate:
    """Runs every check, also after a failure."""
    try:
        causal = causality(subject.router())
    except Exception as error:  # without a router there is nothing to check
        return Certificate(subject.name, "unknown", [Result("is built", "fail", _words(error))])
    results = [run_check(name, check, subject) for name, check in CHECKS.items()]
    return Certificate(subject.name, causal, results)


def run_check(name: str, check: Check, subject: Subject) -> Result:
    """The result of one check; an error of the router's own is a failure, too."""
    try:
        declared = check(subject)
    except AssertionError as error:
        return Result(name, "fail", str(error))
    except Exception as error:
        return Result(name, "fail", _words(error))
    return Result(name, "pass") if declared is None else Result(name, "declared", declared)


def causality(router: Any) -> str:
    """What the router says of itself, in words."""
    if not declares(router, training=False):
        return "no"
    return "yes" if declares(router, training=True) else "training looks ahead"


def card(certificate: Certificate) -> Table:
    """The certificate as a table within 80 columns."""
    verdict = "FAIL" if certificate.failed else "pass"
    title = f"{certificate.router}: {verdict} (causal: {certificate.causal})"
    found = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")
    found.add_column("check", no_wrap=True)
    found.add_column("")
    found.add_column("why")
    for result in certificate.results:
        colour = COLOURS[result.status]
        found.add_row(result.check, f"[{colour}]{result.status}[/{colour}]", Text(result.reason))
    return found


def _words(error: Exception) -> str:
    """The first two lines of a message: what, and often where."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}"[:300]
