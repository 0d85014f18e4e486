"""Runs a pipeline schedule: the actions of this rank, in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llm3d.parallel.mesh import Mesh
from llm3d.parallel.schedules import Action, Kind, Schedule

OutputFunction = Callable[[Any, Any], Tensor]  # see llm3d.models.heads.OutputFunction


class _Transfer(NamedTuple):
    work: dist.Work
    tensor: Tensor  # kept alive until the transfer is done


class Pipeline:
    """The virtual stages of this rank, where its schedule places them, and what they exchange.

    stages: one for each chunk, called with (input, microbatch, objective). The input is None on the first virtual
        stage; the last returns the objective's fp32 [numbers] of the microbatch, the others [rows, hidden] activations.
    hidden_size, dtype: of what crosses between stages; its rows are the microbatch's tokens, of which this rank has
        one in `token_multiple` (under sequence parallelism, the tensor group's size).
    """

    def __init__(
        self,
        mesh: Mesh,
        stages: Sequence[nn.Module],
        schedule: Schedule,
        hidden_size: int,
        dtype: torch.dtype,
        token_multiple: int = 1,
    ) -> None:
        self.mesh, self.stages, self.schedule = mesh, list(stages), schedule
        self.hidden_size, self.dtype, self.token_multiple = hidden_size, dtype, token_multiple
        self._warm = set[bool]()  # with gradients, without

    @property
    def is_cold(self) -> bool:
        """Whether the next run would be the first of its kind, with gradients or without, to use this GPU's kernels."""
        concerned = self.mesh.device.type == "cuda" and self.mesh.pipeline_size > 1
        return concerned and torch.is_grad_enabled() not in self._warm

    def warm_up(self, microbatch: Any, objective: OutputFunction) -> None:
        """Run this rank's stages on zeros, forward and, with gradients, backward; add zeros to the gradients.

        A kernel is loaded when it is first launched, which may take until the device is idle; it is not while a message
        is on its way. No stage sends or receives here. Kernels are not loaded all at once instead
        (CUDA_MODULE_LOADING=EAGER): torch has so many that they take a GB or so of each device.
        """
        training = torch.is_grad_enabled()
        shape, device = self.activation_shape(microbatch), self.mesh.device
        for chunk, stage in enumerate(self.stages):
            hidden = None
            if self.schedule.placement.stage_of(self.mesh.pipeline_rank, chunk) > 0:
                hidden = torch.zeros(shape, dtype=self.dtype, device=device, requires_grad=training)
            output = stage(hidden, microbatch, objective)
            if training:
                torch.autograd.backward(output, torch.zeros_like(output))
        self._warm.add(training)

    def run(
        self, microbatches: Sequence[Any], objective: OutputFunction, scale: float | Tensor = 1.0
    ) -> list[Tensor] | None:
        """Run this rank's part of the schedule, with gradients or, where autograd is off, without.

        -> the objective's numbers of each microbatch on the last stage, None on the others.
        scale: what backward multiplies the first of the numbers by, one over what the step's loss is divided by; on
            the device where no host is to wait for it.
        Activations, [rows, hidden] in the compute dtype, go to the next stage, and as much comes back.
        """
        forward_only = not torch.is_grad_enabled()
        part = self.schedule.part(self.mesh.pipeline_rank, len(microbatches), forward_only)
        step = _Step(self, microbatches, objective, scale, part.arrivals)
        for action in part.actions:
            step.run(action)
        for transfer in step.sent.values():
            transfer.work.wait()
        assert not step.received and not step.inputs, (
            "every activation received was used and given its gradient"
        )
        return [step.numbers[i] for i in range(len(microbatches))] if step.numbers else None

    def activation_shape(self, microbatch: Any) -> tuple[int, int]:
        """Of what crosses between stages."""
        return len(microbatch.tokens) // self.token_multiple, self.hidden_size


class _Step:
    """What is in flight during one run of a schedule. Its keys are (chunk, microbatch), or the actions of messages."""

    def __init__(
        self,
        pipeline: Pipeline,
        microbatches: Sequence[Any],
        objective: OutputFunction,
        scale: float | Tensor,
        arrivals: dict[Action, list[Action]],
    ) -> None:
        self.pipeline, self.mesh, self.microbatches = pipeline, pipeline.mesh, microbatches
        self.rank, self.placement = pipeline.mesh.pipeline_rank, pipeline.schedule.placement
        self.objective, self.scale, self.arrivals = objective, scale, arrivals
        self.received: dict[Action, _Transfer] = {}
        self.ready: dict[Action, Tensor] = {}  # computed, to be sent
        self.sent: dict[Action, _Transfer] = {}
        self.inputs: dict[tuple[int, int], Tensor | None] = {}
        self.outputs: dict[tuple[int, int], Tensor] = {}
        self.numbers: dict[int, Tensor] = {}  # by microbatch
        self._run = {
            Kind.RECV_FORWARD: self.receive,
            Kind.FORWARD: self.forward,
            Kind.SEND_FORWARD: self.send,
            Kind.RECV_BACKWARD: self.receive,
            Kind.BACKWARD: self.backward,
            Kind.SEND_BACKWARD: self.send,
        }

    def run(self, action: Action) -> None:
        self._run[action.kind](action)

    def receive(self, action: Action) -> None:
        shape = self.pipeline.activation_shape(self.microbatches[action.microbatch])
        buffer = torch.empty(shape, dtype=self.pipeline.dtype, device=self.mesh.device)
        source, _ = self.placement.other_end((self.rank, action))
        work = dist.irecv(buffer, group=self.channel(action), group_src=source)
        assert work is not None, "this rank is in its pipeline group"
        self.received[action] = _Transfer(work, buffer)

    def send(self, action: Action) -> None:
        tensor = self.ready.pop(action)
        target, _ = self.placement.other_end((self.rank, action))
        work = dist.isend(tensor, group=self.channel(action), group_dst=target)
        assert work is not None, "this rank is in its pipeline group"
        self.sent[action] = _Transfer(work, tensor)

    def forward(self, action: Action) -> None:
        key, hidden = (action.chunk, action.microbatch), self.wait_for_input(action)
        training = torch.is_grad_enabled()
        if hidden is not None and training:
            hidden.requires_grad_()
        microbatch = self.microbatches[action.microbatch]
        output = self.pipeline.stages[action.chunk](hidden, microbatch, self.objective)
        if training:
            self.inputs[key], self.outputs[key] = hidden, output
        send = self.placement.send_after((self.rank, action))
        if send is None:
            self.numbers[action.microbatch] = output.detach()
        else:
            assert output.shape == self.pipeline.activation_shape(microbatch), "the next stage expects it so"
            self.ready[send] = output.detach().contiguous()

    def backward(self, action: Action) -> None:
        key, gradient = (action.chunk, action.microbatch), self.wait_for_input(action)
        output, hidden = self.outputs.pop(key), self.inputs.pop(key)
        if gradient is None:
            gradient = torch.zeros_like(output)
            gradient[0] = self.scale
        torch.autograd.backward(output, gradient)
        send = self.placement.send_after((self.rank, action))
        if send is not None:
            assert hidden is not None and hidden.grad is not None, "the loss depends on every stage's input"
            self.ready[send] = hidden.grad.contiguous()

    def wait_for_input(self, action: Action) -> Tensor | None:
        """What a computation receives, if anything; the tensors that have arrived before it was sent are let go."""
        receive = self.placement.receive_for((self.rank, action))
        if receive is None:
            return None
        transfer = self.received.pop(receive)
        transfer.work.wait()
        for send in self.arrivals[action]:
            self.sent.pop(send).work.wait()
        return transfer.tensor

    def channel(self, message: Action) -> dist.ProcessGroup:
        """The group for one direction of traffic over one link, so that its messages match in order."""
        return self.mesh.channels[self.placement.channel_of((self.rank, message))]
