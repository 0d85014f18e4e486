"""Every layout gives the same training as one process."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.closeness import assert_same_tensors
from tests.parity.harness import QWEN3, TIED, Layout, one_process, train, trained

LAYOUTS = [
    Layout(tensor=2, micro=4),
    Layout(tensor=4, micro=4),
    Layout(tensor=2, sequence=True, micro=4),
    Layout(tensor=4, sequence=True, recompute="selective", micro=4),
    Layout(tensor=4, model=TIED, recompute="full", micro=4),
    Layout(pipeline=2, schedule="gpipe"),
    Layout(pipeline=2, schedule="1f1b", recompute="full"),
    Layout(pipeline=4, schedule="1f1b", model=TIED),
    Layout(pipeline=4, schedule="gpipe", recompute="selective", micro=2),
    Layout(pipeline=2, chunks=2, schedule="interleaved"),
    Layout(pipeline=4, chunks=2, schedule="interleaved", model=TIED),
    Layout(pipeline=2, schedule="1f1b", layers_per_stage=(2, 7)),
    Layout(data=2),
    Layout(data=4, model=TIED),
    Layout(tensor=2, data=2, sequence=True, recompute="full", micro=2),
    Layout(tensor=4, data=2, micro=2),
    Layout(tensor=2, data=4, micro=2, sequence=True),
    Layout(pipeline=2, data=2, schedule="1f1b"),
    Layout(pipeline=2, data=4, schedule="gpipe", model=TIED),
    Layout(pipeline=4, data=2, schedule="1f1b", micro=2),
    Layout(tensor=2, pipeline=2, schedule="1f1b", sequence=True),
    Layout(tensor=4, pipeline=2, schedule="1f1b", sequence=True, model=TIED),
    Layout(tensor=2, pipeline=4, schedule="gpipe", recompute="selective"),
    Layout(
        tensor=2, pipeline=2, chunks=2, schedule="interleaved", sequence=True, model=TIED, recompute="full"
    ),
    Layout(tensor=2, pipeline=2, data=2, schedule="1f1b", sequence=True, model=TIED),
    Layout(tensor=2, pipeline=2, data=2, chunks=2, schedule="interleaved", recompute="selective", micro=2),
    Layout(tensor=2, micro=4, model=QWEN3),
    Layout(tensor=4, sequence=True, recompute="selective", micro=4, model=QWEN3),
    Layout(tensor=2, pipeline=2, recompute="full", sequence=True, model=QWEN3),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_loss_and_gradient_norm_do_not_depend_on_the_layout(layout: Layout) -> None:
    expected, actual = one_process(layout), trained(layout)
    assert actual.losses == pytest.approx(expected.losses, rel=1e-5)
    assert actual.grad_norms == pytest.approx(expected.grad_norms, rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_gradients_do_not_depend_on_the_layout(layout: Layout) -> None:
    assert_same_tensors(trained(layout).gradients, one_process(layout).gradients, 1e-5)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_weights_after_some_steps_do_not_depend_on_the_layout(layout: Layout) -> None:
    assert_same_tensors(trained(layout).weights, one_process(layout).weights)


def test_training_changes_every_weight_and_lowers_the_loss() -> None:
    run = train(Layout(), steps=3)
    assert all(float(gradient.norm()) > 0 for gradient in run.gradients.values())
    assert run.losses[-1] < run.losses[0]


def test_one_process_does_not_depend_on_microbatching_or_recomputing() -> None:
    expected = one_process(Layout())
    for layout in (Layout(micro=4), replace(Layout(micro=8), recompute="full")):
        run = trained(layout)
        assert run.losses == pytest.approx(expected.losses, rel=1e-5)
        assert run.grad_norms == pytest.approx(expected.grad_norms, rel=1e-5)
        torch.testing.assert_close(run.gradients, expected.gradients, rtol=1e-3, atol=1e-6)
