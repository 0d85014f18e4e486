"""Loss and perplexity of a run's latest checkpoint, or of a Hugging Face directory, on the validation data."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from llm3d.config import Config
from llm3d.errors import InputError
from llm3d.parallel.mesh import Mesh, start_process_group
from llm3d.stages.language_data import LanguageData, open_tokenizer
from llm3d.stages.pretrain import checkpoint_to_resume
from llm3d.train.checkpoint import load_pretrained
from llm3d.train.loop import evaluate
from llm3d.train.trainer import Evaluator


def run(config: Config) -> None:
    """Print the loss over data.valid: all of it, or train.eval_steps batches."""
    if not config.data.valid:
        raise InputError("data.valid: empty; name the data to evaluate on")
    source = checkpoint_to_resume(config, Path(config.run.dir)) or config.model.path
    if source is None:
        raise InputError(
            f"run.dir: {config.run.dir} has no checkpoint to evaluate; train first, or name one with "
            "checkpoint.resume=PATH or model.path=PATH"
        )
    config, _ = open_tokenizer(config)
    data = LanguageData(config)
    device = start_process_group()
    try:
        data.mesh = Mesh(config.parallel.tensor, config.parallel.pipeline, device)
        model = Evaluator(config, data.mesh)
        load_pretrained(Path(source), model)
        result = evaluate(model, data)
        if data.mesh.rank == 0:
            print(
                f"{source}: loss {result.loss:.4f}, perplexity {result.perplexity:.3f} on {result.num_targets:,} tokens"
            )
    finally:
        dist.destroy_process_group()
