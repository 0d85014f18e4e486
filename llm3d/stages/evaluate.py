"""Loss and perplexity of a run's latest checkpoint, or of a Hugging Face directory, on the validation data."""

from __future__ import annotations

from pathlib import Path

from llm3d.config import PretrainConfig
from llm3d.errors import InputError
from llm3d.kernels import backend
from llm3d.parallel.agreement import input_errors_on_all
from llm3d.parallel.mesh import Mesh, device_of_this_process, process_group, whole_world
from llm3d.stages.language_data import ValidationData
from llm3d.stages.tokenizer import open_tokenizer
from llm3d.stages.training import checkpoint_to_resume
from llm3d.train.checkpoint import load_pretrained
from llm3d.train.loop import evaluate
from llm3d.train.trainer import Evaluator


def run(config: PretrainConfig) -> None:
    """Print the loss over data.valid: all of it, or train.eval_steps batches."""
    with process_group() as device:
        with input_errors_on_all(whole_world()):
            config, data = check(config)
        mesh = Mesh(config.parallel.tensor, config.parallel.pipeline, device)
        source = checkpoint_to_resume(config, Path(config.run.dir), mesh) or config.model.path
        if source is None:
            raise InputError(
                f"run.dir: {config.run.dir} has no checkpoint to evaluate; train first, or name one with "
                "checkpoint.resume=PATH or model.path=PATH"
            )
        model = Evaluator(config, mesh)
        load_pretrained(Path(source), model)
        result = evaluate(model, data)
        if mesh.rank == 0:
            numbers = result.report(model.objective)
            said = ", ".join(f"{name} {value:.4f}" for name, value in numbers.items())
            print(f"{source}: {said} on {result.num_terms:,} tokens")


def check(config: PretrainConfig) -> tuple[PretrainConfig, ValidationData]:
    """Open what the settings name; raise InputError where it cannot be used."""
    backend.use(config.kernels.backend, device_of_this_process())
    if not config.data.valid:
        raise InputError("data.valid: empty; name the data to evaluate on")
    config, _ = open_tokenizer(config)
    return config, ValidationData(config)
