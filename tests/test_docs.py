"""The documentation leads to what exists: files, headings, settings, commands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.main import get_command

from llm3d.cli import app
from llm3d.config import STAGES, parse_config
from llm3d.config.explain import setting_paths
from llm3d.config.settings_file import read_settings
from llm3d.rl.learner import VALIDATED
from llm3d.stages.stage import stage_of
from llm3d.train.objective import names_of

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/results/*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
SETTINGS = {path for kind in STAGES.values() for path, _ in setting_paths(kind)}
SECTIONS = {path.partition(".")[0] for path in SETTINGS if "." in path}


def anchor(heading: str) -> str:
    """The name that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith(("http://", "https://")):
            continue
        path, _, name = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), link
        if name:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert name in map(anchor, headings), link


def test_the_walks_go_through_files_that_exist() -> None:
    files = re.findall(r"`(\w+/[\w/]+\.py)`", (ROOT / "docs/ARCHITECTURE.md").read_text(encoding="utf-8"))
    assert files and not [file for file in files if not (ROOT / "llm3d" / file).exists()]


def named_settings(text: str) -> Iterator[str]:
    """Paths that stand in backticks, or before the = of an override."""
    section = "|".join(sorted(SECTIONS))
    yield from re.findall(rf"`((?:{section})\.[a-z_.]+)(?:[=`:])", text)
    yield from re.findall(rf"(?<![\w/.`])((?:{section})\.[a-z_.]+)=", text)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_settings_that_are_named_exist(page: Path) -> None:
    known = SETTINGS | {"model.preset"} | {path.rpartition(".")[0] for path in SETTINGS}
    entries = {"ppo.rewards", "ppo.ptx_data", "data.train", "data.valid"}
    for path in named_settings(page.read_text(encoding="utf-8")):
        assert path in known or path.rpartition(".")[0] in entries | {"model.rope_scaling"}, path


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_that_are_shown_exist(page: Path) -> None:
    commands = set(getattr(get_command(app), "commands", {}))
    for command in re.findall(r"^ {4}llm3d ([a-z]+)\b", page.read_text(encoding="utf-8"), re.MULTILINE):
        assert command in commands, command


@pytest.mark.parametrize("stage", STAGES)
def test_metrics_are_explained(stage: str) -> None:
    found = sorted(ROOT.glob(f"configs/stages/{stage}*.yaml"))
    given = read_settings(found[0] if found else ROOT / "configs/stages/sft.yaml")
    settings = {name: given[name] for name in given if name not in STAGES or name == stage}
    settings |= {"model": {"preset": "llama-tiny", "vocab_size": 99}}
    config = parse_config(settings, STAGES[stage])
    names = [name for role in stage_of(config).models(config).roles for name in names_of(role.objective)]
    names += VALIDATED if config.reads == "prompt" else ()
    explained = set(re.findall(r"`/?([\w/]+?)(?:/\.\.\.)?`", explanations(stage)))
    for name in names:
        assert explained & {name, name.partition("/")[0], name.rpartition("/")[2]}, name


def explanations(stage: str) -> str:
    """The page about the stage; of that about several, the rows of the table that name it."""
    page = {"pretrain": "pretraining", "ppo": "reinforcement-learning"}.get(stage, "post-training")
    text = (ROOT / f"docs/{page}.md").read_text(encoding="utf-8")
    if page != "post-training":
        return text
    rows = re.findall(r"^\| ([\w, ]+) \| (.*) \|.*\|$", text, re.MULTILINE)
    return "".join(names for stages, names in rows if stage in stages.split(", "))
