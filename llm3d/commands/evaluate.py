"""What a stage says of its validation data, by a run's latest checkpoint or the model that the settings name."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from llm3d.checkpoint.load import step_of_checkpoint
from llm3d.checkpoint.starting import checkpoint_to_resume, first_state, latest_model
from llm3d.config import Config, PPOConfig, PretrainConfig
from llm3d.data.language import ValidationData
from llm3d.data.run_tokenizer import open_tokenizer
from llm3d.errors import InputError
from llm3d.kernels.settings import use_settings
from llm3d.parallel.agreement import input_errors_on_all
from llm3d.parallel.mesh import Mesh, device_of_this_process, process_group, whole_world
from llm3d.rl import ppo
from llm3d.rl.ppo import OpenedPPO
from llm3d.stages.by_settings import objective_of, open_chat_stage
from llm3d.text.chat_tokenizer import ChatTokenizer
from llm3d.text.tokenizer import Tokenizer
from llm3d.train.loop import EvaluationData
from llm3d.train.objective import NextToken, Objective, Tally
from llm3d.train.report import rounded
from llm3d.train.trainer import Evaluator
from llm3d.wording import counted


class Validation(NamedTuple):
    """What the settings name for an evaluation, opened and found usable."""

    config: Config
    data: EvaluationData
    tokenizer: Tokenizer | ChatTokenizer | None
    objective: Objective
    prepare: Callable[[Evaluator], None] = lambda model: None


def run(config: Config) -> None:
    """Print the objective's numbers over data.valid: all of it, or train.eval_steps batches."""
    with process_group(config.run.device) as device:
        with input_errors_on_all(whole_world()):
            opened = check(config)
        mesh = Mesh(config.parallel.tensor, config.parallel.pipeline, device)
        for remark in opened.tokenizer.remarks if mesh.rank == 0 and opened.tokenizer else ():
            print(remark, file=sys.stderr)
        if isinstance(opened, OpenedPPO):
            source, numbers, terms = evaluate_replies(opened, mesh)
        else:
            source, result = evaluate_latest(opened, mesh)
            numbers = result.report(opened.objective)
            terms = counted(
                result.num_terms, "token" if isinstance(opened.objective, NextToken) else "sample"
            )
        if mesh.rank == 0:
            said = ", ".join(f"{name} {rounded(value)}" for name, value in numbers.items())
            print(f"{source}: {said} on {terms}")


def check(config: Config) -> Validation | OpenedPPO:
    """Open what the settings name; raise InputError where it cannot be used."""
    use_settings(config, device_of_this_process(config.run.device))
    if not config.data.valid:
        raise InputError("data.valid: empty; name the data to evaluate on")
    if isinstance(config, PretrainConfig):
        pretraining, plain = open_tokenizer(config)
        return Validation(pretraining, ValidationData(pretraining), plain, objective_of(pretraining))
    if not isinstance(config.data.valid, float):  # else it is in the training data, which is not read now
        config = config.model_copy(update={"data": config.data.model_copy(update={"train": ()})})
    if isinstance(config, PPOConfig):
        without_texts = config.ppo.model_copy(update={"ptx_data": ()})
        opened_ppo = ppo.open_stage(config.model_copy(update={"ppo": without_texts}))
        return opened_ppo._replace(critic=None)  # is not asked
    opened = open_chat_stage(config)
    return Validation(opened.config, opened.data, opened.tokenizer, opened.objective, opened.prepare)


def evaluate_latest(opened: Validation, mesh: Mesh) -> tuple[str, Tally]:
    """Where the weights came from, and their numbers; the same on every rank."""
    model, source = latest_model(opened.config, mesh, opened.objective, opened.prepare)
    return source, model.evaluate_all(opened.data.evaluation(mesh))


def evaluate_replies(opened: OpenedPPO, mesh: Mesh) -> tuple[str, dict[str, float], str]:
    """Where the policy's weights came from, what its replies to the validation prompts are worth, and to how many."""
    checkpoint = checkpoint_to_resume(opened.config, Path(opened.config.run.dir), mesh)
    trainer = opened.trainer(mesh)
    if checkpoint is not None:
        step_of_checkpoint(checkpoint, trainer)  # whether it is this model's, before anything is loaded
    opened.prepare(trainer)
    _, source = first_state(trainer, checkpoint)
    batches = list(opened.data.evaluation(mesh))
    return source, trainer.validate(batches), counted(sum(map(len, batches)), "prompt")
