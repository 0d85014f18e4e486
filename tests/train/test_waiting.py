"""The host launches a whole step before it waits for a number of it, and waits for no other host."""

from __future__ import annotations

import pytest

from tests.paper import NEEDS_KERNELS, step_on_paper
from tests.parity.harness import Layout
from tests.parity.harness import settings as settings_of_pretraining
from tests.parity.stage_settings import settings as settings_of_stage
from tests.stages.common import trained_model

FOUR = (("num_hidden_layers", 4),)  # a host that does not wait in one layer does not in the next
LAYOUTS = [
    Layout(micro=2, model=FOUR),
    Layout(micro=2, compute="bf16", recompute="full", model=FOUR),
    Layout(micro=2, compute="fp16", model=FOUR),
    Layout(tensor=2, data=2, sequence=True, zero=3, micro=2, model=FOUR),
    Layout(pipeline=2, data=2, zero=1, micro=2, model=FOUR),
    Layout(pipeline=2, chunks=2, schedule="interleaved", micro=2, model=FOUR),
]
STAGES = ["pretrain", "sft-lora", "reward", "dpo"]


def chosen(stage: str, layout: int) -> bool:
    """All layouts of pretraining; of the others, which differ from it in the head alone or in the adapters, some."""
    return stage == "pretrain" or layout == {"sft-lora": 3, "reward": 4, "dpo": 1}[stage]


CASES = [
    pytest.param(
        stage, layout, marks=[] if chosen(stage, i) else pytest.mark.all_layouts, id=f"{stage}-{layout}"
    )
    for stage in STAGES
    for i, layout in enumerate(LAYOUTS)
]


@NEEDS_KERNELS
@pytest.mark.parametrize(("stage", "layout"), CASES)
def test_a_step_is_launched_before_the_host_waits_once(stage: str, layout: Layout) -> None:
    config = settings_of_pretraining(layout) if stage == "pretrain" else settings_of_stage(stage, layout)
    for rank in range(0, layout.world_size, layout.tensor * layout.data):  # of each pipeline stage
        role = trained_model(config)
        happened = step_on_paper(config, role.objective, role.microbatch, layout.world_size, rank)
        assert happened == ["launched", "told", "read"]
