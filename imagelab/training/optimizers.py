"""Several optimisers as one."""

import torch


class JoinedOptimizer(torch.optim.Optimizer):
    """Optimisers of different tensors, one step of which is a step of each.

    Groups and states are those of its parts themselves: a schedule or a checkpoint of the whole is
    one of the parts.
    """

    def __init__(self, *parts: torch.optim.Optimizer):
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = parts
        for part in parts:
            part.state = self.state

    def step(self, closure=None):
        """An update of all tensors; ``closure`` has to be None."""
        if closure is not None:
            raise ValueError("a closure would be evaluated once a part; leave it out")
        for part in self.parts:
            part.step()
