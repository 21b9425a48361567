"""Several optimisers as one."""

import torch


class JoinedOptimizer(torch.optim.Optimizer):
    """Optimisers of different tensors, one step of which is a step of each.

    Groups and the state are those of its parts themselves: a schedule of the whole is one of the
    parts. ``load_state_dict`` would end that; `imagelab.training.checkpoint` fills the state in.
    """

    def __init__(self, *parts: torch.optim.Optimizer):
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = parts
        for part in parts:
            part.state = self.state

    def load_state_dict(self, state_dict) -> None:
        raise NotImplementedError("give the parts their states, or unpack a checkpoint's")

    def step(self, closure=None):
        """An update of all tensors; ``closure`` has to be None."""
        if closure is not None:
            raise ValueError("a closure would be evaluated once a part; leave it out")
        for part in self.parts:
            part.step()
