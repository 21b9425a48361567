"""The loss and its gradients as one CUDA graph: a replay launches thousands of kernels at once.

A UNet of toybox's size is so quick that a GPU would wait for Python most of the time.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def autocast(device: torch.device):
    """bfloat16 where it is faster and does no harm: on CUDA."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


class GraphedGradients:
    """``graphed(step)`` computes the loss of a step, and the parameters' gradients.

    The first call captures the graph. The inputs keep their shapes from step to step, and nobody
    may set gradients to None in between: the graph writes them to where they were first.

    Args:
        inputs: the tensors of a step.
        loss: of these tensors.
        parameters: whose gradients are wanted.
    """

    def __init__(
        self,
        inputs: Callable[[int], Sequence[Tensor]],
        loss: Callable[..., Tensor],
        parameters: list[torch.nn.Parameter],
    ):
        self.inputs, self.loss, self.parameters = inputs, loss, parameters
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, step: int) -> Tensor:
        given = self.inputs(step)
        if self.graph is None:
            self._capture(given)
        torch._foreach_copy_(self.static, list(given))
        self.graph.replay()
        return self.value.clone()

    def _compute(self) -> Tensor:
        with autocast(self.parameters[0].device):
            loss = self.loss(*self.static)
        loss.backward()
        return loss.detach()

    def _clear_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def _capture(self, given: Sequence[Tensor]) -> None:
        """Run it a few times aside, so that everything is set up, then capture it."""
        self.static = [tensor.clone() for tensor in given]
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                self._clear_gradients()
                self._compute()
        torch.cuda.current_stream().wait_stream(aside)
        self._clear_gradients()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.value = self._compute()
