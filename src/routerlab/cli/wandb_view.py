"""``routerlab wandb-view``: a saved view of a W&B project that shows what routers do."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from routerlab.core.config import ConfigError
from routerlab.training.tracking import BEST, LOAD_MAP, STEP, wandb_mode

_FILE = Path("wandb-view.json")
_ABOUT = """\
Makes a saved view of a W&B project: runs grouped by router, panels for loss, load, entropy, cost
and heat maps. Without a key or a network its definition is written to a file.
"""
SECTIONS = {
    "Loss": [*BEST, "train/loss"],
    "Load": ["router/mean/load_entropy", "router/mean/max_violation", "router/mean/dead_experts"],
    "Entropy": [
        "router/mean/mean_entropy", "router/mean/mutual_information",
        "router/mean/domain_information",
    ],
    "Cost": ["train/tokens_per_second"],
}  # fmt: skip
_COSTS = ("flops_per_token", "parameters.active")
_COLUMNS = [f"summary:{key}" for key in ("final/bits_per_byte", "final/accuracy", *_COSTS)]
_MOST_RUNS = 100  # of a panel


def main(argv: Sequence[str]) -> int:
    """Saves the view at W&B, or writes its definition to a file."""
    arguments = _parser().parse_args(list(argv))
    entity, slash, project = arguments.project.partition("/")
    if not (entity and slash and project) or "/" in project:
        raise ConfigError(f"wandb-view {arguments.project!r}: must be ENTITY/PROJECT")
    file: Path | None = arguments.out
    if file is not None and not file.absolute().parent.is_dir():
        raise ConfigError(f"--out {file}: its folder does not exist")
    view = workspace(entity, project, arguments.group)
    if file is None and wandb_mode() == "online":
        return _save(view)
    file = _FILE if file is None else file
    file.write_text(json.dumps(definition(view), indent=2) + "\n")
    print(f"wrote {file}", file=sys.stderr)
    if arguments.out is None:
        print(
            "it is not at W&B yet: that needs a key (wandb login, or WANDB_API_KEY), a server that "
            "answers, and WANDB_MODE unset or online; then repeat the command",
            file=sys.stderr,
        )
    return 0


def workspace(entity: str, project: str, group: str | None) -> Any:
    """The view as an object of wandb-workspaces."""
    try:
        import wandb_workspaces.reports.v2 as panels
        import wandb_workspaces.workspaces as views
    except ImportError as error:
        raise ConfigError(
            f"wandb-view: needs wandb-workspaces ({error}); pip install 'routerlab[wandb-view]'"
        ) from error
    sections = [
        views.Section(
            name=name,
            panels=[panels.LinePlot(title=key, x=STEP, y=[key]) for key in keys],
            is_open=True,
        )
        for name, keys in SECTIONS.items()
    ]
    bars = [panels.BarPlot(title=key, metrics=[panels.SummaryMetric(key)]) for key in _COSTS]
    sections[-1].panels += bars
    browser = panels.MediaBrowser(title="load by layer and expert", media_keys=[LOAD_MAP])
    sections.append(views.Section(name="Heat maps", panels=[browser], is_open=True))
    return views.Workspace(
        entity=entity,
        project=project,
        name=f"routers: {group}" if group else "routers",
        sections=sections,
        settings=views.WorkspaceSettings(x_axis=STEP, max_runs=_MOST_RUNS),
        runset_settings=views.RunsetSettings(
            filters=views.And(views.Metric("Group") == group) if group else "",
            groupby=[views.Metric("JobType")],
            pinned_columns=_COLUMNS,
        ),
    )


def definition(view: Any) -> dict[str, Any]:
    """What the library sends when it saves the view."""
    model = view._to_model()
    spec = json.loads(model.spec.model_dump_json(by_alias=True, exclude_none=True))
    return {"entity": model.entity, "project": model.project, "name": model.display_name} | {
        "spec": spec
    }


def _save(view: Any) -> int:
    import wandb

    try:
        print(view.save().url)
    except (wandb.Error, ValueError, OSError) as error:
        raise ConfigError(f"wandb-view: W&B refused: {' '.join(str(error).split())}") from error
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="routerlab wandb-view", description=_ABOUT)
    parser.add_argument("project", metavar="ENTITY/PROJECT")
    parser.add_argument("--group", help="only the runs of this group: of a sweep, its name")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write the definition there, and save nothing"
    )
    return parser
