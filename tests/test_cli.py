"""What the shell sees: exit codes, one message, no traceback for what the user got wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

import llm3d
from llm3d.cli import app
from llm3d.config import Config, config_to_yaml, load_config
from llm3d.errors import InputError, TrainingAborted

SETTINGS = """
run: {dir: runs/test}
model: {preset: llama-tiny, vocab_size: 500}
data: {train: [corpus/train], sequence_length: 32}
batch: {global: 8}
optim: {lr: 1e-3}
train: {steps: 10}
"""


@pytest.fixture
def settings(tmp_path: Path) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(SETTINGS)
    return str(path)


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def llm3d_command(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> list[Config | Exception | type[BaseException]]:
    """Stands in for llm3d.stages.run: raises what is in the list, or puts its settings there."""
    seen: list[Config | Exception | type[BaseException]] = []

    def run(config: Config) -> None:
        if seen:
            raise seen[0]
        seen.append(config)

    module = ModuleType("llm3d.stages.run")
    module.run_stage = module.open_task = run  # type: ignore[attr-defined]
    module.summary = str  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "llm3d.stages.run", module)
    return seen


def test_help_and_version() -> None:
    code, shown, _ = llm3d_command("--help")
    assert code == 0
    for command in (
        "config",
        "tokenizer",
        "data",
        "pretrain",
        "sft",
        "reward",
        "dpo",
        "eval",
        "export",
        "memory",
    ):
        assert f"  {command} " in shown
    assert llm3d_command("--version") == (0, f"llm3d {llm3d.__version__}\n", "")


def test_the_shell_completes_commands() -> None:
    script = CliRunner().invoke(app, [], env={"_LLM3D_COMPLETE": "source_bash"}, prog_name="llm3d")
    assert script.exit_code == 0 and "_LLM3D_COMPLETE=complete_bash" in script.stdout
    words = {"_LLM3D_COMPLETE": "complete_bash", "COMP_WORDS": "llm3d gen", "COMP_CWORD": "1"}
    found = CliRunner().invoke(app, [], env=words, prog_name="llm3d")
    assert found.stdout.split() == ["generate"]


def test_config_prints_the_settings_that_a_run_has(settings: str) -> None:
    code, shown, _ = llm3d_command("config", settings, "train.steps=20")
    assert code == 0
    assert shown == config_to_yaml(load_config(settings, ["train.steps=20"]))


def test_config_checks_a_layout_for_devices_that_are_not_there(settings: str) -> None:
    assert llm3d_command("config", settings, "parallel.tensor=2")[0] == 0
    assert llm3d_command("config", settings, "parallel.tensor=2", "--world-size", "4")[0] == 0
    code, _, said = llm3d_command("config", settings, "parallel.tensor=2", "--world-size", "3")
    assert (code, said) == (2, "llm3d: world size 3 is not a multiple of tensor 2 x pipeline 1 = 2\n")


def test_the_schema_needs_no_settings() -> None:
    assert "if" in json.loads(llm3d_command("config", "--schema")[1])
    code, shown, _ = llm3d_command("config", "--schema", "--stage", "sft")
    assert code == 0
    assert "parallel" in json.loads(shown)["properties"]
    assert llm3d_command("config")[0] == 2


def test_a_stage_gets_the_settings_of_file_and_command_line(settings: str, stage: list[Config]) -> None:
    assert llm3d_command("pretrain", settings, "optim.lr=0.5", "run.seed=7")[0] == 0
    assert stage == [load_config(settings, ["optim.lr=0.5", "run.seed=7"])]


def test_the_world_size_is_that_of_torchrun(
    settings: str, stage: list[Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert llm3d_command("pretrain", settings, "parallel.tensor=2", "parallel.pipeline=2")[0] == 0
    assert llm3d_command("pretrain", settings, "batch.global=6")[0] == 2
    monkeypatch.setenv("WORLD_SIZE", "four")
    assert llm3d_command("pretrain", settings)[2] == (
        "llm3d: environment variable WORLD_SIZE: 'four' is not a whole number\n"
    )


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        (InputError("corpus is empty\nand so on"), 2, "llm3d: corpus is empty\nllm3d: and so on\n"),
        (TrainingAborted("loss is not finite"), 3, "llm3d: loss is not finite\n"),
        (KeyboardInterrupt, 130, "llm3d: interrupted\n"),
    ],
)
def test_each_way_to_end_has_its_code(
    settings: str, stage: list[object], end: object, code: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.append(end)
    assert llm3d_command("pretrain", settings) == (code, "", said)
    monkeypatch.setenv("RANK", "0")
    assert llm3d_command("pretrain", settings) == (code, "", said)
    monkeypatch.setenv("RANK", "1")
    assert llm3d_command("pretrain", settings) == (code, "", "")


def test_a_bug_keeps_its_traceback(settings: str, stage: list[object]) -> None:
    stage.append(ZeroDivisionError("a bug"))
    result = CliRunner().invoke(app, ["pretrain", settings])
    assert result.exit_code == 1
    assert isinstance(result.exception, ZeroDivisionError)


@pytest.mark.parametrize(
    "arguments",
    [
        ["nothing"],
        ["pretrain"],
        ["pretrain", "nothing.yaml"],
        ["eval", "nothing.yaml"],
        ["eval", "nothing.yaml", "--stage", "nothing"],
        ["export", "nothing"],
        ["export", "nothing", "--output", "x"],
        ["memory", "nothing.yaml"],
        ["data", "show", "nothing.yaml"],
        ["data", "show", "nothing.yaml", "--split", "test"],
        ["config", "nothing.yaml"],
        ["tokenizer"],
        ["tokenizer", "train"],
        ["tokenizer", "train", "a.txt", "--output", "x", "--vocab-size", "0"],
        ["tokenizer", "train", "a.txt", "--output", "x", "--vocab-size", "9", "--kind", "unigram"],
        ["data", "tokenize", "a.txt"],
        ["data", "tokenize", "a.txt", "--output", "x", "--tokenizer", "y", "--workers", "0"],
    ],
    ids=" ".join,
)
def test_wrong_usage_ends_with_code_2(arguments: list[str]) -> None:
    code, _, said = llm3d_command(*arguments)
    assert code == 2
    assert "Traceback" not in said


@pytest.mark.parametrize(
    "override", ["foo", "a.b", "a.b=", "=", "parallel.tensor=3", "optim.lr=[", "model=${x}"]
)
def test_a_broken_override_in_a_real_process(settings: str, override: str) -> None:
    command = [sys.executable, "-m", "llm3d", "pretrain", settings, override]
    ended = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"RANK": "0"}, check=False
    )
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert all(line.startswith("llm3d: ") for line in ended.stderr.splitlines())
    assert ended.stderr


def test_the_launcher_stops_at_a_wrong_setting_before_it_starts_anything(settings: str) -> None:
    launcher = Path(__file__).parent.parent / "launch" / "torchrun.sh"
    command = [str(launcher), "3", "pretrain", settings, "parallel.tensor=2"]
    environment = os.environ | {"PYTHON": sys.executable}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ended.returncode == 2
    assert ended.stderr == "llm3d: world size 3 is not a multiple of tensor 2 x pipeline 1 = 2\n"


def test_from_text_to_training_data_in_real_processes(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "llm3d", *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
        )

    environment = os.environ | {"PYTHONPATH": str(Path(llm3d.__file__).parent.parent)}
    (tmp_path / "text.txt").write_text("\n\n".join(f"{n} bottles of beer on the wall" for n in range(200)))
    trained = run(
        *("tokenizer", "train", "text.txt", "--output", "tokenizer", "--vocab-size", "300"),
        *("--kind", "byte-level", "--separator", r"\n\n"),
    )
    assert (trained.returncode, trained.stderr) == (0, "")
    assert trained.stdout.startswith("tokenizer: 300 tokens, trained on 200 documents")

    (tmp_path / "bad.jsonl").write_text('{"text": "a wall"}\n{"text": \n{"text": "on the wall"}\n')
    tokenize = [
        "data",
        "tokenize",
        "bad.jsonl",
        "--output",
        "corpus",
        "--tokenizer",
        "tokenizer",
        "--workers",
        "1",
    ]
    strict = run(*tokenize)
    assert strict.returncode == 2
    assert "bad.jsonl line 2" in strict.stderr
    assert "Traceback" not in strict.stderr
    lenient = run(*tokenize, "--skip-bad")
    assert lenient.returncode == 0
    assert "left out: 1 record that" in lenient.stderr
    assert {path.name for path in (tmp_path / "corpus").iterdir()} >= {"train.bin", "train.idx", "valid.bin"}
