"""What every stage of training does around its loop: from where it starts, what it says, where it saves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from llm3d.checkpoint.load import (
    step_of_checkpoint,
)
from llm3d.checkpoint.save import BEST, checkpoint_of, save_checkpoint, weights_folder
from llm3d.checkpoint.starting import (
    checkpoint_to_resume,
    latest_on_first_rank,
    seen_by_first_rank,
    start,
)
from llm3d.config import Config, config_to_yaml
from llm3d.config.explain import nearest
from llm3d.data.steps import Consumed
from llm3d.errors import InputError
from llm3d.kernels import attention, backend, linear
from llm3d.kernels.settings import use_settings
from llm3d.parallel.agreement import input_errors_on_all
from llm3d.parallel.collectives import all_reduce_sum
from llm3d.parallel.mesh import Mesh, device_of_this_process, process_group, whole_world
from llm3d.stages.stage import StageData, Task, stage_of
from llm3d.text.chat_tokenizer import ChatTokenizer
from llm3d.text.tokenizer import Tokenizer, load_tokenizer
from llm3d.train.best import Best
from llm3d.train.host_memory import keep_freed_memory
from llm3d.train.learner import Learner
from llm3d.train.learning_rate import shortened
from llm3d.train.loop import train
from llm3d.train.meaning import check_meaning
from llm3d.train.numa import bind_to_gpu_node
from llm3d.train.report import Report
from llm3d.train.throughput import peak_flops
from llm3d.train.trainer import Trainer
from llm3d.wording import counted

C = TypeVar("C", bound=Config)


def run_stage(config: Config) -> None:
    """Train to the run's last step, going on from the run directory's latest checkpoint if there is one."""
    with process_group(config.run.device) as device:
        if device.type == "cpu":
            keep_freed_memory()
        elif config.zero.offload != "none":
            bind_to_gpu_node(device)
        with input_errors_on_all(whole_world()):
            task = open_task(config)
        train_task(task, Mesh(config.parallel.tensor, config.parallel.pipeline, device))


def open_task(config: Config) -> Task:
    """Open all that a run's settings name. Raises InputError where it cannot be used."""
    use_settings(config, device_of_this_process(config.run.device))
    task: Task = stage_of(config).open(config)
    _check_best(config.checkpoint.best, task.validation_names)
    return task


def _check_best(name: str | None, validation_names: Sequence[str]) -> None:
    """Raise InputError where no evaluation has such a number."""
    names = [f"valid_{each}" for each in validation_names]
    if name is not None and name not in names:
        raise InputError(
            f"checkpoint.best: {name!r} is not among the numbers of an evaluation: {', '.join(names)}"
            f"{nearest(name, names)}"
        )


def summary(task: Task) -> str:
    """One line for a user who only checks: that all can be used, and how long the run would be."""
    config, steps = task.config, task.data.steps
    passes = steps.epoch(steps.last)
    epochs = "" if passes is None else f", {passes:.2f} passes over the data"
    return (
        f"nothing is wrong: {counted(config.model.num_parameters(config.head), 'parameter')}, "
        f"{counted(steps.last, 'step')} of {counted(steps.size, 'sample')}{epochs}; nothing was written"
    )


def train_task(task: Task, mesh: Mesh) -> None:
    """Train what a task opened, from its first weights or from a checkpoint, to the run's last step."""
    config, data = task.config, task.data
    run_dir = Path(config.run.dir)
    checkpoint = checkpoint_to_resume(config, run_dir, mesh)
    learner = task.learner(mesh)
    start_step, changes = check_goes_on(checkpoint, learner, task.tokenizer) if checkpoint else (0, [])
    check_run_directory(run_dir, start_step, mesh)  # before anything is computed or written
    learner.prepare()
    state, origin = start(learner, checkpoint)
    data.resume(start_step, Consumed(state.get("samples", 0), state.get("tokens", 0)))
    make_run_directory(run_dir, config, mesh)
    last_step = min(data.steps.last, config.train.stop_after or data.steps.last)
    best = best_so_far(config, run_dir, state, mesh)

    def save(step: int) -> Path:
        consumed = data.consumed(step)._asdict()
        state = {"step": step, **consumed, "order": data.digest, "best": best.state, **learner.state}
        keep, best_step = config.checkpoint.keep, best.step or None
        path = save_checkpoint(
            run_dir, step, learner.trainer, state, task.tokenizer, keep, best_step, learner.others
        )
        report.say(f"step {step}: saved {path}")
        return path

    with Report(run_dir, start_step, last_step, mesh.rank == 0, config.log.tensorboard) as report:
        introduce(report, learner, data, origin)
        for line in (*(task.tokenizer.remarks if task.tokenizer else ()), *changes):
            report.say(line)
        if state and state["order"] != data.digest:
            report.say(
                "the training data, its weights or its order are not those of the checkpoint: "
                f"goes on at sample {state['samples']:,} of the new order"
            )
        if start_step >= last_step:
            total = "train.steps" if config.train.steps else "train.epochs"
            ends = "train.stop_after" if last_step < data.steps.last else total
            report.say(f"nothing to do: {origin} is at step {start_step}; raise {ends} to train on")
            return
        if best.has_waited_enough:
            report.say(f"nothing to do: {origin}: {best}; raise train.patience to train on")
            return
        train(learner, data, report, start_step, save, best)
        if best.has_waited_enough:
            report.say(f"training ends early: none better in the last {counted(best.waited, 'evaluation')}")
        if best.step:
            report.say(f"{best}: {run_dir / 'checkpoints' / BEST}")


def best_so_far(config: Config, run_dir: Path, state: dict[str, Any], mesh: Mesh) -> Best:
    """What is known of the run's best checkpoint, where it is still there."""
    best = Best.of(config)
    best.restore(state.get("best", {}))
    return best if seen_by_first_rank(checkpoint_of(run_dir, best.step), mesh) else Best.of(config)


def check_run_directory(run_dir: Path, start_step: int, mesh: Mesh) -> None:
    """Raise InputError where the run directory holds checkpoints from later than this run starts."""
    latest = latest_on_first_rank(run_dir, mesh)
    if latest is not None and int(latest.name.removeprefix("step-")) > start_step:
        raise InputError(
            f"run.dir: {run_dir} holds {latest.name}, later than step {start_step}, where this run starts; "
            "name another run.dir, remove the checkpoints, or let checkpoint.resume be auto"
        )


def check_goes_on(
    checkpoint: Path, learner: Learner, tokenizer: Tokenizer | ChatTokenizer | None
) -> tuple[int, list[str]]:
    """The step of a checkpoint, and on the first rank what has changed since, for people. Called on all ranks.

    Raises InputError where the settings, the tokenizer or the chat template give it another meaning.
    """
    trainer = learner.trainer
    step, mesh = step_of_checkpoint(checkpoint, trainer, learner.others), trainer.mesh
    with input_errors_on_all(mesh.everyone):
        if mesh.rank:
            return step, []
        _check_tokenizer(checkpoint / weights_folder(trainer), tokenizer)
        return step, check_meaning(checkpoint, trainer.config, trainer.meaning)


def _check_tokenizer(directory: Path, tokenizer: Tokenizer | ChatTokenizer | None) -> None:
    """Raise InputError where a checkpoint's files have another tokenizer or another chat template."""
    chat = tokenizer if isinstance(tokenizer, ChatTokenizer) else None
    plain = tokenizer.tokenizer if isinstance(tokenizer, ChatTokenizer) else tokenizer
    if plain is None or not list(directory.glob("tokenizer.*")):
        return
    remedy = "set it as it was, or name another run.dir"
    saved_one = load_tokenizer(directory)
    difference = saved_one.difference_from(plain) or plain.difference_from(saved_one)
    if difference is not None:
        raise InputError(f"data.tokenizer: another one than in {directory}: {difference}; {remedy}")
    saved = directory / "chat_template.jinja"
    if chat and saved.is_file() and saved.read_text(encoding="utf-8") != chat.template.source:
        raise InputError(
            f"data.template: {chat.template.name} is not what the run was trained with, {saved}; {remedy}"
        )


def make_run_directory(run_dir: Path, config: Config, mesh: Mesh) -> None:
    """run.dir with config.yaml in it, once nothing that was asked for has proved wrong; every rank then sees it."""
    with input_errors_on_all(mesh.everyone):
        if mesh.rank == 0:
            try:
                run_dir.mkdir(parents=True, exist_ok=True)
                (run_dir / "config.yaml").write_text(config_to_yaml(config), encoding="utf-8")
            except OSError as error:
                raise InputError(
                    f"run.dir: {run_dir}: {error.strerror}; name a directory that can be written"
                ) from None


def introduce(report: Report, learner: Learner, data: StageData, origin: str) -> None:
    """Say what is trained, from where, on what, and against what MFU is taken."""
    trainer = learner.trainer
    config, mesh = trainer.config, trainer.mesh
    device, peak = peak_flops(mesh.device, config.precision.compute)
    trained = f", of which {num_trained(trainer):,} are trained," if config.lora.rank else ""
    report.say(f"{config.model.num_parameters(trainer.objective.head):,} parameters{trained} from {origin}")
    report.say(f"{mesh} on {mesh.size} x {device}, {config.precision.compute}")
    if mesh.data_size > 1:
        each, once = trainer.flat.traffic()
        report.say(
            f"zero.stage {config.zero.stage}: rank 0 sends {once / 2**20:,.1f} MiB a step and at most "
            f"{each / 2**20:,.1f} MiB a microbatch over its data group"
        )
    report.say(f"kernels: {backend.describe(mesh.device)}; attention: {attention.describe(mesh.device)}")
    if by_onednn := linear.describe():
        report.say(f"matrix products by oneDNN, which is faster than BLAS here: {by_onednn}")
    if peak:
        report.say(f"MFU counts 6 N and causal attention, against {peak / 1e12:g} TFLOP/s a device")
    for line in (*learner.introduction(), *data.introduction(mesh)):
        report.say(line)
    _, scheduled = data.steps.schedule(data.steps.last)
    for remark in (data.steps.repetition(), shortened(scheduled, config.optim)):
        if remark is not None:
            report.say(remark)


def num_trained(trainer: Trainer) -> int:
    """Weights of the whole model that are trained. Called on all ranks."""
    flat = trainer.flat
    mine = sum(piece.box.numel for piece, _ in flat.pieces(flat.parameters) if piece.owned)
    return int(all_reduce_sum(torch.tensor(mine), flat.mesh.everyone)) // flat.num_replicas
