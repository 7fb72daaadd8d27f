"""The rows of a study to a table of means, intervals and differences."""

from collections.abc import Mapping, Sequence

from routerlab.comparison.statistics import Interval, interval, paired

from .definition import Study
from .results import Row

NAMES = {
    "bits_per_byte": "bits/byte",
    "ess_mean": "ESS, mean",
    "ess_min": "ESS, min",
    "probs_ess_mean": "ESS of softmax, mean",
    "probs_ess_p05": "ESS of softmax, 5th percentile",
    "lowest_probs_ess": "ESS of softmax, least in training",
    "distance_before": "neighbour distance before",
    "distance_after": "after",
    "distance_ratio": "after / before",
    "routing_similarity": "CKA after",
    "max_violation": "max violation",
    "avg_max_violation": "AvgMaxVio",
    "sup_max_violation": "SupMaxVio",
    "load_entropy": "load entropy",
    "coupling_radius_mean": "radius (probe)",
    "coupling_ratio": "ratio (probe)",
    "coupling_expert_violations": "violated pairs",
    "dead_experts": "dead experts",
    "mean_entropy": "token entropy",
    "mutual_information": "mutual information",
    "domain_information": "domain information",
    "experts_per_token": "experts/token",
    "active_parameters": "active parameters",
    "step_seconds": "s/step",
}


def table(study: Study, rows: Sequence[Row], times: Mapping[str, float]) -> str:
    """The page: question, table, what its words mean, and what failed.

    ``times``: the cost of an arm's training step over the baseline's, by arm.
    """
    seeds = sorted({row["seed"] for row in rows})
    metrics = list(dict.fromkeys([study.headline, *study.metrics]))
    metrics = [m for m in metrics if any(m in row for row in rows)]
    head = ["arm", "runs"]
    for metric in metrics:
        head.append(name(metric))
        if metric in study.compare:
            head += [f"{name(metric)} - baseline", "separated"]
    head += ["step time"] if times else []
    head += ["looks ahead"]
    lines = [_row(head), _row(["---"] * len(head))]
    comparisons = 0
    for arm in study.compared:
        cells = [study.label(arm) + (" (baseline)" if arm == study.baseline else "")]
        cells.append(f"{len(by_seed(rows, arm, study.headline))}")
        for metric in metrics:
            values = by_seed(rows, arm, metric)
            cells.append(show(interval(list(values.values())) if values else None))
            if metric in study.compare:
                difference = None
                if arm != study.baseline:
                    difference = paired(values, by_seed(rows, study.baseline, metric))
                comparisons += difference is not None and difference.half is not None
                cells += [show(difference, sign=True), _yes(difference)]
        if times:
            cells.append(f"{times[arm]:.2f} x" if arm in times else "-")
        ahead = {row["looks_ahead"] for row in rows if row["arm"] == arm and "looks_ahead" in row}
        cells.append(", ".join(sorted(ahead)) or "-")
        lines.append(_row(cells))
    about = [f"# {study.name}", study.question, f"Claim ({study.paper}): {study.claim}"]
    return "\n\n".join([*about, "\n".join(lines), _legend(study, seeds, comparisons, times)]) + (
        _failures(rows)
    )


def by_seed(rows: Sequence[Row], arm: str, metric: str) -> dict[int, float]:
    """The values of an arm, by seed."""
    return {row["seed"]: row[metric] for row in rows if row["arm"] == arm and metric in row}


def name(metric: str) -> str:
    """A metric's name for readers."""
    return NAMES.get(metric, metric.replace("_", " "))


def show(found: Interval | None, sign: bool = False) -> str:
    """``mean ± half``, with as many digits as four of the mean, or two of the interval."""
    if found is None:
        return "-"
    if abs(found.mean) >= 1000:
        return f"{found.mean:,.0f}"
    mean = f"{found.mean:{'+' if sign else ''}.3f}"
    return mean if found.half is None else f"{mean} ± {found.half:.3f}"


def _legend(study: Study, seeds: Sequence[int], comparisons: int, times: Mapping) -> str:
    numbers, chance = ",".join(map(str, seeds)), comparisons * 0.05
    lines = [
        f"`python experiments/study.py run {study.name} --seeds {numbers}`. Mean over seeds ± half "
        "the 95% t-interval. Router metrics are means over layers on held-out text.",
        "Differences to the baseline are taken seed by seed, for runs of a seed share the order of "
        f"the data; separated: their 95% interval leaves out 0. Of {comparisons} such intervals "
        f"{chance:.1f} would do so by chance.",
    ]
    if times:
        lines.append(
            "Step time: CPU time of a training step over the baseline's, trained weights, one "
            "thread, arms taking turns (step_time.csv)."
        )
    lines.append(
        "Looks ahead: routing depends on later tokens in training only, or in evaluation too; the "
        "numbers of the latter are not those of a language model."
    )
    return "\n\n".join(lines) + "\n"


def _failures(rows: Sequence[Row]) -> str:
    missing = [row for row in rows if row["state"] != "done"]
    lines = [f"- {r['arm']} seed {r['seed']}: {r['state']} {r.get('error', '')}" for r in missing]
    return "\nRuns without a result:\n\n" + "\n".join(lines) + "\n" if lines else ""


def _yes(difference: Interval | None) -> str:
    if difference is None or difference.separated is None:
        return "-"
    return "yes" if difference.separated else "no"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
