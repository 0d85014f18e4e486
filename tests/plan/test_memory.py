"""What is planned on paper is what a step takes, and what is kept is what the ZeRO paper promises."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor
from typer.testing import CliRunner

from llm3d.cli import app
from llm3d.config import STAGES, Config, PretrainConfig, make_config
from llm3d.data.conversations import ChatData
from llm3d.data.pretraining import Window, collate
from llm3d.data.samples import Sample, SampleSet, Tokens
from llm3d.models.batch import Batch
from llm3d.parallel.mesh import Mesh
from llm3d.parallel.zero.offload import CHUNK_ELEMENTS
from llm3d.plan.memory import Memory, memory_of_stages
from llm3d.stages.stage import stage_of
from llm3d.train.host_memory import PeakAllocated
from llm3d.train.trainer import Trainer
from tests import pool
from tests.parity.harness import GLOBAL_BATCH, LEARNING_RATE, Layout, settings
from tests.parity.stage_settings import settings as stage_settings
from tests.plan.live import live_bytes
from tests.stages import post_training
from tests.stages.common import trained_model
from tests.stages.post_training import write_model

LENGTH, VOCABULARY, NUM_LAYERS = 96, 1000, 8
DEEP = (
    ("vocab_size", VOCABULARY),
    ("hidden_size", 192),
    ("intermediate_size", 512),
    ("num_hidden_layers", NUM_LAYERS),
    ("num_attention_heads", 6),
    ("num_key_value_heads", 2),
    ("max_position_embeddings", 128),
)
QWEN3 = (*DEEP, ("model_type", "qwen3"))
C = TypeVar("C", bound=Config)
PLAIN = Layout(model=DEEP, micro=2)


def global_batch(layout: Layout) -> int:
    """As many microbatches as are ever in flight: what more of them take is what these have taken."""
    if layout.schedule == "gpipe":
        return GLOBAL_BATCH
    return min(GLOBAL_BATCH, 2 * layout.pipeline * layout.chunks * layout.micro * layout.data)


@pytest.fixture(scope="module", autouse=True)
def processes_without_a_past() -> None:
    pool.renew()


def config_of(layout: Layout) -> PretrainConfig:
    return as_planned(settings(layout), layout)


def as_planned(config: C, layout: Layout) -> C:
    """With gradients in the compute dtype, as the paper counts them."""
    gradients = "bf16" if layout.compute == "bf16" else "fp32"
    return config.model_copy(
        update={
            "batch": config.batch.model_copy(update={"global_size": global_batch(layout)}),
            "data": config.data.model_copy(update={"sequence_length": LENGTH}),
            "precision": config.precision.model_copy(update={"gradients": gradients}),
        }
    )


def plan(config: Config, world_size: int, device_type: str) -> list[Memory]:
    trained, *frozen = stage_of(config).models(config).roles
    return memory_of_stages(trained, world_size, device_type, frozen)


def config_of_stage(stage: str, layout: Layout) -> Config:
    return config_of(layout) if stage == "pretrain" else as_planned(stage_settings(stage, layout), layout)


def batches_of_stage(stage: str, layout: Layout, mesh: Mesh) -> Sequence[Batch]:
    """Of the longest sequences."""
    if stage != "pretrain":
        tokens = Tokens(np.arange(LENGTH, dtype=np.int32), np.ones(LENGTH, dtype=bool))
        ranks = (0.0,) if stage.startswith("sft") else (0.0, 1.0)
        samples = SampleSet.of([Sample((tokens,) * len(ranks), ranks)] * global_batch(layout))
        return ChatData(config_of_stage(stage, layout), [samples], []).microbatches(1, mesh)
    generator = torch.Generator().manual_seed(mesh.data_rank)
    rows = torch.randint(
        0, VOCABULARY, (global_batch(layout) // layout.data, LENGTH + 1), generator=generator
    )
    windows = [Window(row, [0]) for row in rows]
    return [collate(windows[i : i + layout.micro]) for i in range(0, len(windows), layout.micro)]


def measure_on_rank(stage: str, layout: Layout, num_peaks: int = 3) -> tuple[int, int]:
    """Bytes that live between steps, of the model and its optimizer, and at the peak of one, the least of some."""
    before = live_bytes()
    mesh, config = Mesh(layout.tensor, layout.pipeline), config_of_stage(stage, layout)
    trainer = Trainer(config, mesh, trained_model(config).objective)
    trainer.initialize()
    batches = batches_of_stage(stage, layout, mesh)
    data = sum(
        value.nbytes for batch in batches for value in vars(batch).values() if isinstance(value, Tensor)
    )

    def step() -> None:
        trainer.step(batches, LEARNING_RATE)
        trainer.flat.wait_all_gathers()

    step()
    kept = live_bytes() - before - data
    peaks = []
    for _ in range(
        num_peaks
    ):  # some may meet what is allocated once and kept, as matrix products' workspaces
        with PeakAllocated() as allocated:
            step()
        peaks.append(allocated.peak)
    return kept, kept + min(peaks, default=0)


def largest_of_stages(parts: list[tuple[int, int]], layout: Layout) -> list[tuple[int, int]]:
    per_stage = len(parts) // layout.pipeline
    stages = [parts[i : i + per_stage] for i in range(0, len(parts), per_stage)]
    return [(max(kept for kept, _ in stage), max(peak for _, peak in stage)) for stage in stages]


@pytest.mark.parametrize(
    ("stage", "layout"),
    [
        ("pretrain", PLAIN),
        ("pretrain", replace(PLAIN, micro=8, recompute="full")),
        ("pretrain", replace(PLAIN, data=2, zero=1, compute="bf16")),
        ("pretrain", replace(PLAIN, data=2, zero=2, recompute="selective")),
        ("pretrain", replace(PLAIN, data=4, zero=3, compute="bf16", offload=0.5)),
        ("pretrain", replace(PLAIN, tensor=2, pipeline=2, sequence=True)),
        ("pretrain", replace(PLAIN, pipeline=2, data=2, zero=1, schedule="gpipe", compute="bf16")),
        ("pretrain", replace(PLAIN, pipeline=2, data=2, zero=3, chunks=2, schedule="interleaved")),
        ("sft", replace(PLAIN, data=2, zero=1)),
        ("reward", replace(PLAIN, pipeline=2, schedule="gpipe")),
        ("dpo", replace(PLAIN, micro=4, tensor=2, sequence=True)),
        ("sft-lora", PLAIN),
        ("reward-lora", replace(PLAIN, tensor=2, data=2, zero=2, compute="bf16")),
        ("dpo-lora", replace(PLAIN, micro=4, pipeline=2, data=2, zero=3)),
        ("pretrain", replace(PLAIN, tensor=2, sequence=True, recompute="selective", model=QWEN3)),
        ("sft-lora", replace(PLAIN, model=QWEN3)),
    ],
    ids=str,
)
def test_the_plan_is_what_a_step_takes(stage: str, layout: Layout) -> None:
    measured = largest_of_stages(pool.run(measure_on_rank, layout.world_size, stage, layout), layout)
    planned = plan(config_of_stage(stage, layout), layout.world_size, "cpu")
    for (kept, peak), memory in zip(measured, planned, strict=True):
        total = memory.on_device + memory.on_host
        assert total == pytest.approx(peak, rel=0.05)
        assert total - memory.buffers - memory.activations == pytest.approx(kept, rel=0.01)


def promise(stage: int, data: int) -> Any:
    """One rank and eight are tried of each ZeRO stage always, and numbers between them of one stage each."""
    few = data in (1, 8) or (stage, data) in ((2, 2), (3, 4))
    return pytest.param(stage, data, marks=[] if few else pytest.mark.all_layouts)


@pytest.mark.parametrize(("stage", "data"), [promise(*case) for case in product((1, 2, 3), (1, 2, 4, 8))])
def test_what_is_kept_is_what_zero_promises(stage: int, data: int) -> None:
    """Bytes a parameter in bf16, with fp32 master weights and moments: Rajbhandari et al. 2020, section 3."""
    num_layers = 16
    deep = (*DEEP, ("num_hidden_layers", num_layers))
    layout = replace(PLAIN, data=data, zero=stage, compute="bf16", micro=1, model=deep)
    promised = {1: 4 + 12 / data, 2: 2 + 14 / data, 3: 16 / data}[stage]
    num_parameters = settings(layout).model.num_parameters()
    layer = 2 * (num_parameters - 2 * VOCABULARY * 192) / num_layers
    for kept, _ in pool.run(measure_on_rank, data, "pretrain", layout, 0):
        assert abs(kept - promised * num_parameters) < 0.05 * promised * num_parameters + layer


CONFIG = """
run: {dir: unused}
model: {preset: llama-2-70b}
precision: {compute: bf16}
data: {train: [unused], sequence_length: 4096}
batch: {global: 1024}
optim: {lr: 1e-4}
train: {steps: 1}
"""


def memory_command(path: Path, *overrides: str) -> tuple[int, str]:
    path.write_text(CONFIG)
    return invoke("memory", str(path), *overrides)


def invoke(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, words)
    return result.exit_code, result.stdout + result.stderr


def test_a_gpu_keeps_narrow_sums_and_wide_products(tmp_path: Path) -> None:
    """Its reduce-scatter needs no room for all parts; the product that is a weight's gradient is made in fp32."""
    layout = replace(PLAIN, data=4, zero=2, compute="bf16")
    config = config_of(layout)
    (gpu,), (cpu,) = (plan(config, 4, device_type) for device_type in ("cuda", "cpu"))
    assert gpu.buffers < cpu.buffers
    assert (gpu.parameters, gpu.gradients, gpu.moments) == (cpu.parameters, cpu.gradients, cpu.moments)


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_selective_recompute_frees_the_norms_and_swiglus_outputs(compute: str) -> None:
    layout = replace(PLAIN, compute=compute)
    (none,), (selective,) = (
        plan(config_of(replace(layout, recompute=kind)), 1, "cuda") for kind in ("none", "selective")
    )
    freed = NUM_LAYERS * layout.micro * LENGTH * (2 * 192 + 512) * (4 if compute == "fp32" else 2)
    assert none.activations - selective.activations == pytest.approx(freed, rel=0.1)


@pytest.mark.parametrize(
    ("layout", "collective", "pairs"),
    [
        (PLAIN, 0, 0),
        (replace(PLAIN, data=2, zero=1), 1, 0),  # the data group is the world
        (replace(PLAIN, tensor=2, data=2, zero=1), 3, 0),
        (replace(PLAIN, tensor=2, data=2, pipeline=2), 4, 4),
    ],
    ids=str,
)
def test_communicators_take_memory_on_a_gpu(layout: Layout, collective: int, pairs: int) -> None:
    """Each receives in 16 channels, from a ring and a tree or from one peer, into 9.2 MiB."""
    config = config_of(layout)
    for device_type in ("cuda", "cpu"):
        memory = plan(config, layout.world_size, device_type)[0]
        expected = (2 * collective + pairs) * 16 * 9.1875 * 2**20 if device_type == "cuda" else 0
        assert memory.communicators == expected
        kinds = [getattr(memory, field.name) for field in fields(memory)]
        assert memory.on_device == sum(kinds) - memory.on_host


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_sums_in_bf16_take_no_more_than_a_copy_of_a_unit(zero: int) -> None:
    config = config_of(replace(PLAIN, data=4, zero=zero))
    precision = config.precision.model_copy(update={"reduce_dtype": "bf16"})
    narrow = config.model_copy(update={"precision": precision})
    (wide_plan,), (narrow_plan,) = (plan(each, 4, "cuda") for each in (config, narrow))
    largest_unit = VOCABULARY * 192
    assert narrow_plan.on_device <= wide_plan.on_device + 2 * largest_unit


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_it_can_be_planned_without_kernels(tmp_path: Path, kernels: str) -> None:
    small = ("model={preset: llama-tiny, vocab_size: 500}", "data.sequence_length=64", "recompute=selective")
    code, shown = memory_command(tmp_path / "config.yaml", *small, f"kernels.backend={kernels}")
    assert (code, shown.count("on the device")) == (0, 1), shown


def test_the_command_plans_for_ranks_that_are_not_there(tmp_path: Path) -> None:
    layout = ("parallel.tensor=8", "parallel.pipeline=4", "world_size=1024", "zero.stage=1")
    code, shown = memory_command(tmp_path / "config.yaml", *layout, "recompute=full")
    assert code == 0
    assert "tensor 8 x pipeline 4 x data 32, zero.stage 1, bf16" in shown
    lines = {line[:16].strip(): line[16:].split() for line in shown.splitlines()[2:-1]}
    # Of a stage's 69 G / 32 parameters: 2 bytes each, 4 of gradients, 12 / 32 of the rest; in the first stage more.
    share = 68.977e9 / 32 / 2**30
    assert [float(x) for x in lines["gradients"]] == pytest.approx([4 * share] * 4, rel=0.02)
    assert [float(x) for x in lines["moments"]] == pytest.approx([8 * share / 32] * 4, rel=0.02)
    total = [sum(float(lines[kind][i]) for kind in KINDS) for i in range(4)]
    assert [float(x) for x in lines["on the device"]] == pytest.approx(total, abs=0.01)


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_the_command_knows_every_stage(stage: str, tmp_path: Path) -> None:
    given = post_training.settings(write_model(tmp_path / "model"), "unused.jsonl", tmp_path / "run")
    given |= {stage: {}, "lora": {"rank": 4}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(given))
    words = ("precision.compute=bf16", "data.sequence_length=128", "world_size=2", "zero.stage=1")
    code, shown = invoke("memory", str(tmp_path / "config.yaml"), *words)
    assert code == 0
    assert "adapters of rank 4, tensor 1 x pipeline 1 x data 2, zero.stage 1, bf16" in shown
    model = make_config(given, 1, STAGES[stage]).model
    num_parameters = model.num_parameters("score" if stage == "reward" else "language")
    assert shown.startswith(f"{num_parameters:,} parameters, adapters")
    code, said = invoke("memory", str(tmp_path / "config.yaml"), "--stage", "pretrain")
    assert code == 2 and f"{stage}: unknown setting" in said


@pytest.mark.parametrize(("rank", "copies"), [(0, 2), (4, 1)])
def test_a_reference_that_is_asked_at_each_step_has_its_place(rank: int, copies: int, tmp_path: Path) -> None:
    given = post_training.settings(write_model(tmp_path / "model"), "unused.jsonl", tmp_path / "run")
    config = {
        how: make_config(given | {"dpo": {"reference": how}, "lora": {"rank": rank}}, 1, STAGES["dpo"])
        for how in ("cached", "live")
    }
    (cached,), (live,) = (plan(config[how], 1, "cpu") for how in config)
    assert live == replace(cached, parameters=copies * cached.parameters)


KINDS = (
    "parameters",
    "gradients",
    "master weights",
    "moments",
    "ZeRO's buffers",
    "activations",
    "NCCL (estimate)",
)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("world_size=x", "llm3d: world_size: 'x' is not a whole number"),
        ("world_size=3", "llm3d: batch.global: 1024 is not a multiple of"),
        ("parallel.tensor=3", "llm3d: parallel.tensor: 3 does not divide"),
    ],
)
def test_what_cannot_be_planned_is_said(tmp_path: Path, override: str, said: str) -> None:
    code, shown = memory_command(tmp_path / "config.yaml", override)
    assert code == 2 and shown.startswith(said)


def test_offloaded_state_is_in_host_memory() -> None:
    def planned(offload: float, device_type: str = "cpu") -> Memory:
        (memory,) = plan(config_of(replace(PLAIN, offload=offload, compute="bf16")), 1, device_type)
        return memory

    here, half, there = planned(0.0), planned(0.5), planned(1.0)
    assert (here.on_host, there.master, there.moments) == (0, 0, 0)
    assert there.on_host == here.master + here.moments
    assert 0.4 * there.on_host < half.on_host < 0.6 * there.on_host
    assert half.master + half.moments + half.on_host == there.on_host
    buffers = 4 * 2 * CHUNK_ELEMENTS  # two each for gradients and parameters
    assert planned(1.0, "cuda").on_host == there.on_host + buffers, (
        "what passes between host and GPU has room there"
    )
