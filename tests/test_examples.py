"""The scripts in examples/ do what they say, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = ("model.preset=llama-tiny", "data.sequence_length=32", "batch.global=4", "train.eval_steps=1")


def run(name: str, *arguments: str | Path) -> str:
    alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=alone)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_model_is_trained_and_generates_text(tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(f'{{"text": "The number after {i} is {i + 1}."}}\n' for i in range(400)))
    said = run("train.py", tmp_path / "out", text, *SMALL, "train.steps=2")
    model = tmp_path / "out/run/checkpoints/step-00000002/model"
    assert str(model) in said and (model / "config.json").is_file()
    written = run("generate.py", tmp_path / "out/run", "The number", "generate.max_new_tokens=4")
    assert written.startswith("The number")
