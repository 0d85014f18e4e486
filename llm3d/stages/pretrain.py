"""Causal language modelling from tokenised text: next-token cross-entropy, from random or given weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llm3d.config import Config, config_to_yaml
from llm3d.data.tokenizer import Tokenizer
from llm3d.errors import InputError
from llm3d.kernels import backend
from llm3d.parallel.agreement import input_errors_on_all
from llm3d.parallel.collectives import gather_bytes
from llm3d.parallel.mesh import Mesh, device_of_this_process, process_group, whole_world
from llm3d.stages.language_data import LanguageData, open_tokenizer
from llm3d.train.checkpoint import latest_checkpoint, load_checkpoint, load_pretrained, save_checkpoint
from llm3d.train.host_memory import keep_freed_memory
from llm3d.train.loop import Consumed, train
from llm3d.train.numa import bind_to_gpu_node
from llm3d.train.report import Report
from llm3d.train.throughput import FORMULA, peak_flops
from llm3d.train.trainer import Trainer


def run(config: Config) -> None:
    """Train to train.steps, going on from the run directory's latest checkpoint if there is one."""
    with process_group() as device:
        if device.type == "cpu":
            keep_freed_memory()
        elif config.zero.offload != "none":
            bind_to_gpu_node(device)
        with input_errors_on_all(whole_world()):
            config, tokenizer, data = check(config)
        mesh = Mesh(config.parallel.tensor, config.parallel.pipeline, device)
        pretrain(config, mesh, data, tokenizer)


def check(config: Config) -> tuple[Config, Tokenizer | None, LanguageData]:
    """Open what the settings name: kernels, tokenizer, data. Raises InputError where it cannot be used."""
    backend.use(config.kernels.backend, device_of_this_process())
    config, tokenizer = open_tokenizer(config)
    return config, tokenizer, LanguageData(config)


def pretrain(config: Config, mesh: Mesh, data: LanguageData, tokenizer: Tokenizer | None) -> None:
    run_dir = Path(config.run.dir)
    trainer = Trainer(config, mesh)
    state, origin = first_state(trainer, run_dir)
    start_step = int(state.get("step", 0))
    data.resume(start_step, Consumed(state.get("samples", 0), state.get("tokens", 0)))
    check_run_directory(run_dir, start_step, mesh)
    make_run_directory(run_dir, config, mesh)
    speaks = mesh.rank == 0
    with Report(run_dir, start_step, config.train.steps, speaks, config.log.tensorboard) as report:
        introduce(report, trainer, data, origin)
        if state and state["order"] != data.train.digest:
            report.say(
                "the training data, its weights or its order are not those of the checkpoint: "
                f"goes on at sample {state['samples']:,} of the new order"
            )
        if start_step >= min(config.train.steps, config.train.stop_after or config.train.steps):
            report.say(f"nothing to do: {origin} is at step {start_step}; raise train.steps to train on")
            return

        def save(step: int) -> Path:
            state = {"step": step, **data.consumed(step)._asdict(), "order": data.train.digest}
            path = save_checkpoint(run_dir, step, trainer, state, tokenizer, config.checkpoint.keep)
            report.say(f"step {step}: saved {path}")
            return path

        train(trainer, data, report, start_step, save)


def first_state(trainer: Trainer, run_dir: Path) -> tuple[dict[str, Any], str]:
    """Give the model its first weights; -> the checkpoint's state ({} without one) and where they came from."""
    config = trainer.config
    checkpoint = checkpoint_to_resume(config, run_dir, trainer.mesh)
    if checkpoint is not None:
        return load_checkpoint(checkpoint, trainer), str(checkpoint)
    if config.model.path is not None:
        load_pretrained(Path(config.model.path), trainer)
        return {}, config.model.path
    trainer.initialise()
    return {}, f"random weights, seed {config.run.seed}"


def checkpoint_to_resume(config: Config, run_dir: Path, mesh: Mesh) -> Path | None:
    """What checkpoint.resume names: the run directory's latest checkpoint, none, or a path."""
    if config.checkpoint.resume == "auto":
        return latest_on_first_rank(run_dir, mesh)
    return None if config.checkpoint.resume == "none" else Path(config.checkpoint.resume)


def latest_on_first_rank(run_dir: Path, mesh: Mesh) -> Path | None:
    """The latest checkpoint that rank 0 sees, on every rank: hosts may see a shared directory differently."""
    latest = gather_bytes(str(latest_checkpoint(run_dir) or "").encode(), mesh.everyone)[0].decode()
    return Path(latest) if latest else None


def check_run_directory(run_dir: Path, start_step: int, mesh: Mesh) -> None:
    """Raise InputError where the run directory holds checkpoints from later than this run starts."""
    latest = latest_on_first_rank(run_dir, mesh)
    if latest is not None and int(latest.name.removeprefix("step-")) > start_step:
        raise InputError(
            f"run.dir: {run_dir} holds {latest.name}, later than step {start_step}, where this run starts; "
            "name another run.dir, remove the checkpoints, or let checkpoint.resume be auto"
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


def introduce(report: Report, trainer: Trainer, data: LanguageData, origin: str) -> None:
    """Say what is trained, from where, on what, and against what MFU is taken."""
    config, mesh = trainer.config, trainer.mesh
    device, peak = peak_flops(mesh.device, config.precision.compute)
    tokens = config.batch.global_size * config.data.sequence_length
    report.say(f"{config.model.num_parameters():,} parameters from {origin}")
    report.say(
        f"{mesh} on {mesh.size} x {device}, {config.precision.compute}; {tokens:,} tokens a step in "
        f"{config.num_microbatches(mesh.size)} microbatches a data rank"
    )
    if mesh.data_size > 1:
        each, once = trainer.flat.traffic()
        report.say(
            f"zero.stage {config.zero.stage}: rank 0 sends {once / 2**20:,.1f} MiB a step and at most "
            f"{each / 2**20:,.1f} MiB a microbatch over its data group"
        )
    against = f"MFU against {peak / 1e12:g} TFLOP/s a device" if peak else "no MFU: the peak is not known"
    report.say(f"kernels: {backend.describe(mesh.device)}")
    report.say(f"{FORMULA}; {against}")
    epochs = data.train.epochs(data.consumed(config.train.steps).samples)
    passes = ", ".join(
        f"{source.path} {times:.2f} times" for source, times in zip(config.data.train, epochs, strict=True)
    )
    report.say(f"by step {config.train.steps} it has read {passes}")
