"""From the text that every Python installation carries to a small language model, in a few minutes on two cores.

    make demo

Every step is a command that you could type, and is shown. All of it lands in demo/.
"""

from __future__ import annotations

import ast
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
DEMO = Path("demo")
CONFIG = "configs/stages/demo.yaml"
RUN = DEMO / "run"
HALF_WAY = 150


def main() -> None:
    os.chdir(HERE)
    started = time.monotonic()
    shutil.rmtree(RUN, ignore_errors=True)  # an earlier demo's
    say("1. A corpus: the docstrings of the standard library and Python's help topics")
    write_corpus(DEMO / "python.jsonl")
    say("2. A tokenizer for it, and the corpus as tokens")
    run(
        f"llm3d tokenizer train {DEMO}/python.jsonl --output {DEMO}/tokenizer --vocab-size 4000 "
        "--kind byte-level --overwrite"
    )
    run(
        f"llm3d data tokenize {DEMO}/python.jsonl --output {DEMO}/corpus --tokenizer {DEMO}/tokenizer "
        "--valid-fraction 0.02 --overwrite"
    )
    say("3. Pretraining on two processes that share every layer (tensor parallelism), stopped half-way")
    layouts = ["parallel.tensor=2 parallel.sequence=true", "parallel.pipeline=2 batch.micro=2"]
    run_on(2, f"pretrain {CONFIG} {layouts[0]} train.stop_after={HALF_WAY}")
    say("4. The same run goes on as two pipeline stages: a checkpoint fits any layout")
    run_on(2, f"pretrain {CONFIG} {layouts[1]}")
    say("5. Perplexity on documents that it has not seen, on one process")
    run(f"llm3d eval {CONFIG}")
    plot_losses(RUN / "metrics.jsonl", DEMO / "loss.png", layouts)
    farewell(time.monotonic() - started)


def say(line: str) -> None:
    print(f"\n\033[1m{line}\033[0m" if sys.stdout.isatty() else f"\n{line}", flush=True)


def run(command: str) -> None:
    """Show a command and run it with this environment's programs; a failure ends the demo with its exit code."""
    print(f"  $ {command}", flush=True)
    programs = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    code = subprocess.run(shlex.split(command), env=environment, check=False).returncode
    if code:
        sys.exit(code)


def run_on(processes: int, command: str) -> None:
    """A command of llm3d on several processes, whatever the machine has: each takes a GPU, or all share the CPU."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    on_cpu = " run.device=cpu" if 0 < gpus < processes else ""
    run(f"launch/torchrun.sh {processes} {command}{on_cpu}")


def write_corpus(path: Path) -> None:
    """One document a module, class or function of the standard library, and one a help topic; JSON lines."""
    path.parent.mkdir(exist_ok=True)
    documents = 0
    with path.open("w", encoding="utf-8") as file:
        for text in (*docstrings(Path(sysconfig.get_paths()["stdlib"])), *help_topics()):
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            documents += 1
    print(f"  {path}: {documents:,} documents, {path.stat().st_size / 1e6:.1f} MB")


def docstrings(library: Path) -> Iterator[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for source in sorted(library.rglob("*.py")):
        if {"site-packages", "test", "tests", "idlelib", "lib2to3"} & set(source.relative_to(library).parts):
            continue
        try:
            tree = ast.parse(source.read_bytes())
        except (SyntaxError, ValueError):
            continue
        module = ".".join(source.relative_to(library).with_suffix("").parts)
        for node in ast.walk(tree):
            documentation = ast.get_docstring(node) if isinstance(node, kinds) else None
            if documentation:
                name = "" if isinstance(node, ast.Module) else f".{node.name}"
                yield f"{module}{name}\n\n{documentation}"


def help_topics() -> Iterator[str]:
    from pydoc_data.topics import topics

    yield from topics.values()


def plot_losses(metrics: Path, picture: Path, layouts: list[str]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    halves = (
        [step for step in steps if step["step"] <= HALF_WAY],
        [step for step in steps if step["step"] > HALF_WAY],
    )
    for half, layout in zip(halves, layouts, strict=True):
        axes.plot(
            [step["step"] for step in half], [step["loss"] for step in half], label=f"training, {layout}"
        )
    evaluated = [step for step in steps if "valid_loss" in step]
    axes.plot(
        [step["step"] for step in evaluated],
        [step["valid_loss"] for step in evaluated],
        "ko-",
        markersize=4,
        label="validation",
    )
    axes.set(xlabel="step", ylabel="loss (nats a token)", title="A small LLaMA learns Python's documentation")
    axes.legend()
    figure.savefig(picture, dpi=120)


def farewell(seconds: float) -> None:
    print(f"""
Done in {seconds:.0f} s. Where everything lies:
  {DEMO}/loss.png                the loss curve
  {RUN}/metrics.jsonl            every step's numbers (TensorBoard: tensorboard --logdir {RUN}/tensorboard)
  {RUN}/config.yaml              all settings of the run
  {RUN}/checkpoints/*/model      a Hugging Face directory: AutoModelForCausalLM.from_pretrained loads it

What to try next, after `source .venv/bin/activate`:
  llm3d pretrain {CONFIG} run.dir={DEMO}/again precision.compute=bf16
  launch/torchrun.sh 4 pretrain {CONFIG} run.dir={DEMO}/four parallel.tensor=2 parallel.pipeline=2
  your own text: see docs/laptop.md""")


if __name__ == "__main__":
    main()
