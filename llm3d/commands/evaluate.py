"""What a stage says of its validation data, by a run's latest checkpoint or the model that the settings name."""

from __future__ import annotations

import sys

from llm3d.checkpoint.starting import latest_checkpoint_or_start, load_latest
from llm3d.config import Config
from llm3d.errors import InputError
from llm3d.kernels.settings import use_settings
from llm3d.parallel.agreement import input_errors_on_all
from llm3d.parallel.mesh import Mesh, device_of_this_process, process_group, whole_world
from llm3d.stages.stage import Task, stage_of
from llm3d.train.learner import Evaluation
from llm3d.train.report import rounded
from llm3d.wording import counted


def run(config: Config) -> None:
    """Print the objective's numbers over data.valid: all of it, or train.eval_steps batches."""
    with process_group(config.run.device) as device:
        with input_errors_on_all(whole_world()):
            task = check(config)
        mesh = Mesh(config.parallel.tensor, config.parallel.pipeline, device)
        for remark in task.tokenizer.remarks if mesh.rank == 0 and task.tokenizer else ():
            print(remark, file=sys.stderr)
        source, (numbers, num_terms, unit) = evaluate_latest(task, mesh)
        if mesh.rank == 0:
            summary = ", ".join(f"{name} {rounded(value)}" for name, value in numbers.items())
            print(f"{source}: {summary} on {counted(num_terms, unit)}")


def check(config: Config) -> Task:
    """Open what the settings name; raise InputError where it cannot be used."""
    use_settings(config, device_of_this_process(config.run.device))
    if not config.data.valid:
        raise InputError("data.valid: empty; name the data to evaluate on")
    task: Task = stage_of(config).open(config, training=False)
    return task


def evaluate_latest(task: Task, mesh: Mesh) -> tuple[str, Evaluation]:
    """Where the weights came from, and their numbers; the same on every rank."""
    checkpoint = latest_checkpoint_or_start(task.config, mesh)
    learner = task.learner(mesh, training=False)
    source, state = load_latest(learner.model, checkpoint, learner.prepare)
    learner.restore(state)
    return source, learner.evaluate(task.data.evaluation(mesh))
