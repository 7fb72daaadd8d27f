"""What a study asks and compares, from its study.yaml."""

import re
from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml

FOLDER = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Study:
    """The arms of a study are lists of overrides on the command line of ``routerlab train``.

    ``common`` overrides come before each arm's own. Differences are taken to the arm ``baseline``.
    ``headline`` is the first column of the table, ``metrics`` the others, and ``compare`` those of
    which it shows the difference to the baseline. ``panels`` are the metrics that the figure shows
    by arm; both are the headline unless they say otherwise. ``curve``: a column of metrics.csv that
    the figure shows over training. ``labels``: arms shown under another name. ``experiment`` is the
    config that all arms start from. ``{run:ARM}`` in an override is the run directory of another
    arm and the same seed, which is trained first, and not compared with the others.
    """

    folder: Path
    question: str
    claim: str
    paper: str
    baseline: str
    arms: dict[str, list[str]]
    common: list[str] = field(default_factory=list)
    metrics: list[str] = field(default_factory=list)
    compare: list[str] = field(default_factory=list)
    panels: list[str] = field(default_factory=list)
    curve: str | None = None
    labels: dict[str, str] = field(default_factory=dict)
    experiment: str = "study"
    headline: str = "bits_per_byte"

    def __post_init__(self) -> None:
        where = self.folder / "study.yaml"
        for shown in (self.compare, self.panels):
            if not shown:
                shown.append(self.headline)
        if self.baseline not in self.arms:
            raise ValueError(f"{where}: baseline {self.baseline!r} is no arm")
        if unknown := set(self.labels) - set(self.arms):
            raise ValueError(f"{where}: labels of {sorted(unknown)}, which are no arms")
        for arm, words in self.arms.items():
            if not re.fullmatch(r"[\w.]+", arm):
                raise ValueError(f"{where}: arm {arm!r} cannot be the name of a folder")
            if not all(isinstance(word, str) for word in words):
                raise ValueError(f"{where}: arm {arm!r}: overrides are words such as router=hash")
            if wrong := [a for a in self.sources(arm) if a not in self.arms or self.sources(a)]:
                raise ValueError(
                    f"{where}: arm {arm!r}: {{run:{wrong[0]}}} must be an arm that stands alone"
                )

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.folder.name

    def words(self, arm: str, output: Path | None = None, seed: int = 0) -> list[str]:
        """The overrides of an arm, without a seed; those of other runs lie in ``output``."""
        words = [f"experiment={self.experiment}", *self.common, *self.arms[arm]]
        for source in self.sources(arm):
            path = self.run_path(output or Path("outputs/studies"), source, seed)
            words = [word.replace(f"{{run:{source}}}", str(path)) for word in words]
        return words

    def sources(self, arm: str) -> list[str]:
        """The arms on whose runs an arm builds."""
        return re.findall(r"\{run:([\w.]+)\}", " ".join(self.arms[arm]))

    @property
    def compared(self) -> list[str]:
        """The arms of table and figure: those that no other arm builds on."""
        sources = {source for arm in self.arms for source in self.sources(arm)}
        return [arm for arm in self.arms if arm not in sources]

    def label(self, arm: str) -> str:
        """The name of an arm for readers."""
        return self.labels.get(arm, arm)

    def run_path(self, output: Path, arm: str, seed: int) -> Path:
        """Where the run of an arm and a seed lies."""
        return output / self.name / arm / f"seed_{seed}"


def load(name: str) -> Study:
    """The study in ``experiments/<name>``, or in the folder ``name``."""
    folder = FOLDER / name if (FOLDER / name / "study.yaml").is_file() else Path(name).resolve()
    if not (folder / "study.yaml").is_file():
        found = ", ".join(names())
        raise ValueError(f"no study {name!r} (no study.yaml there); in experiments/: {found}")
    values = yaml.safe_load((folder / "study.yaml").read_text())
    known = {f.name for f in fields(Study)} - {"folder"}
    if unknown := set(values) - known:
        raise ValueError(f"{folder / 'study.yaml'}: unknown keys {sorted(unknown)}")
    arms = {str(arm): words or [] for arm, words in values.pop("arms").items()}
    return Study(folder=folder, arms=arms, **values)


def names() -> list[str]:
    """The studies in experiments/."""
    return sorted(path.parent.name for path in FOLDER.glob("*/study.yaml"))
