"""What is counted on paper is what a step does."""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import replace

import expected
import pytest
import torch
from expected import Counted, Operations, counted
from throughput import parse, random_batches, settings

from llm3d.bench.cases import Sizes, make_cases
from llm3d.config import PretrainConfig
from llm3d.train.throughput import step_flops
from tests.kernels.backends import WHY_NOT

MICRO, LENGTH = 2, 32
TOKENS = MICRO * LENGTH
OPTIONS = f"llama-tiny --vocab-size 500 --micro {MICRO} --sequence-length {LENGTH} --microbatches 2"
CPU = torch.device("cpu")


def workload(options: str = "") -> tuple[PretrainConfig, argparse.Namespace]:
    arguments = parse([*OPTIONS.split(), *options.split()])
    return settings(arguments), arguments


@pytest.fixture(scope="module")
def counts() -> Counted:
    return counted(*workload())


def flops(operations: Operations, part: str) -> int:
    return sum(n * x.flops for x, n in operations.items() if x.part == part)


def test_products_and_attention_are_the_flops_of_mfu(counts: Counted) -> None:
    """Attention's backward does five products, of which MFU counts four."""
    config, arguments = workload()
    layers = config.model.num_hidden_layers
    products = layers * flops(counts.layer, "products") + flops(counts.ends, "products")
    attention = layers * flops(counts.layer, "attention")
    useful = step_flops(config.model, random_batches(arguments, 1, 0, CPU), TOKENS)
    vectors = 6 * TOKENS * (2 * layers + 1) * config.model.hidden_size  # norms' weights are in no product
    assert products + attention * 6 / 7 == pytest.approx(useful - vectors, rel=1e-12)


def test_what_is_recomputed_is_counted_again(counts: Counted) -> None:
    again = counted(*workload("--recompute full"))
    assert flops(again.layer, "products") / flops(counts.layer, "products") == pytest.approx(8 / 6)
    assert flops(again.layer, "attention") / flops(counts.layer, "attention") == pytest.approx(9 / 7)
    forward = Counter({x.name: n for x, n in counts.layer.items() if not x.backward})
    # The sum that is kept is made before the layer, not in its first norm.
    forward.subtract({"add_rms_norm_forward": 1})
    forward.update({"add": 1, "rms_norm_forward": 1})
    assert Counter({x.name: n for x, n in again.layer.items() if not x.backward}) == forward


def test_a_sum_apart_is_a_pass_over_the_weights_more(counts: Counted) -> None:
    """A product that is added to its sum reads and writes the sum; else it is written, and both are read."""
    apart = counted(*workload(), apart=True)
    assert flops(apart.layer, "products") == flops(counts.layer, "products")
    assert apart.layer.total() == counts.layer.total() + 4
    moved = sum(n * x.bytes for x, n in apart.layer.items()) - sum(
        n * x.bytes for x, n in counts.layer.items()
    )
    assert moved == 8 * layer_weights()


def layer_weights() -> int:
    """In matrices."""
    model = workload()[0].model
    more = model.model_copy(update={"num_hidden_layers": model.num_hidden_layers + 1})
    return more.num_parameters() - model.num_parameters() - 2 * model.hidden_size


def test_a_layer_on_paper_is_a_layer_that_runs() -> None:
    """In fp32, which a GPU's code and a CPU's compute alike; attention is each one's own."""
    paper, runs = counted(*workload("--compute fp32")), counted(*workload("--compute fp32"), CPU)
    assert of_both(paper.layer).total() >= 12, "the products of four matrices"
    for part in ("layer", "ends", "optimizer_of_layer", "optimizer_of_ends"):
        assert of_both(getattr(paper, part)) == of_both(getattr(runs, part)), part


def of_both(operations: Operations) -> Operations:
    """Products and native operations, whose names are not those of PyTorch's."""
    ours = {
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("llm3d::")
    }
    kept = {x: n for x, n in operations.items() if x.name == "product" or x.name in ours}
    return Counter(kept)


@pytest.mark.skipif(bool(WHY_NOT), reason=str(WHY_NOT))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bytes_are_those_that_each_kernel_must_move(dtype: torch.dtype) -> None:
    sizes = Sizes(
        tokens=64, hidden=128, heads=4, intermediate=96, vocabulary=500, parameters=1000, context=16
    )
    seen = set()
    for case in make_cases(sizes, dtype, "cpu"):
        run, recorder = case.ours(), expected.Recorder()
        with recorder:
            run()
        (operation,) = (
            (x for x in recorder.operations if x.name == case.op) if in_a_step(case.op) else (None,)
        )
        if operation is not None:
            seen.add(case.op)
            assert operation.bytes == pytest.approx(case.least_bytes, rel=0.02), case.name
    assert len(seen) > 6


def in_a_step(op: str) -> bool:
    return not op.startswith(("kv_cache", "paged"))


def test_no_step_is_faster_than_its_operations(counts: Counted) -> None:
    config, arguments = workload()
    for gpu in expected.GPUS:
        found = expected.expected(counts, config, arguments, gpu, "fa2")
        assert found.step > expected.MICROBATCHES * config.model.num_hidden_layers * found.host
        assert 0 < found.mfu < 1
        faster = replace(gpu, products=(2 * gpu.peak, 2 * gpu.peak), bandwidth=2 * gpu.bandwidth)
        assert expected.expected(counts, config, arguments, faster, "fa2").step <= found.step


def test_a_view_or_room_is_no_launch_and_a_write_is_one() -> None:
    recorder = expected.Recorder()
    x = torch.zeros(4, 6)
    with recorder:
        several = [x.t(), x[1:], x.view(-1), torch.empty(9), x[:1].expand(4, 6)]
        assert not recorder.operations
        x[:2].add_(1.0)
        several[-1].add(x)
    assert [(x.name, x.bytes) for x in recorder.operations] == [("add_", 2 * 48), ("add", 24 + 96 + 96)]
