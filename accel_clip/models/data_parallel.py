"""A model that every process holds whole, and how its gradients come together: averaged once a step, by torch's DDP.

No other file knows DDP: a model whose weights are divided among processes is a second class with these methods.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

Outputs = dict[str, Tensor]


class DataParallel:
    """A wrapped model, whose gradients are each process's own until a backward pass in `reduced` averages them.

    model: as Accelerate has wrapped it, so that mixed precision applies.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module) -> None:
        self.accelerator, self.model = accelerator, model

    @property
    def completes_step(self) -> bool:
        """Return whether the batch in `accumulating` is the last one of its optimizer step."""
        return bool(self.accelerator.sync_gradients)

    def accumulating(self) -> AbstractContextManager[None]:
        """Take one contrastive batch of an optimizer step in a block."""
        return self.accelerator.accumulate(self.model)

    def forward(self, **inputs: Any) -> Outputs:
        """Return the model's outputs without arming the reduction, which a pass in `reduced` does."""
        with self.alone():
            return self.model(**inputs)

    def alone(self) -> AbstractContextManager[None]:
        """Leave gradients with this process in a block, whose passes wait for no other process."""
        return self.accelerator.no_sync(self.model)

    def reduced(self) -> AbstractContextManager[None]:
        """Average gradients over processes in the backward pass inside, unless the step goes on after this batch.

        The pass must reach every trained parameter: each is waited for.
        """
        if self.completes_step:
            return self.accelerator.trigger_sync_in_backward(self.model)
        return self.alone()

    def settle(self, inputs: Mapping[str, Any], scalar_of: Callable[[Outputs], Tensor]) -> None:
        """Let DDP order its buckets now, by passes whose gradients are to be forgotten; collective.

        It orders them anew in the first forward after the first backward, with a collective that the steps of different
        processes would meet at different moments; and a resumed run would add up in another order than it did.
        """
        scalar_of(self.model(**inputs)).backward()
        self.forward(**inputs)


def data_parallel(accelerator: Accelerator, model: nn.Module, optimizer: Any) -> tuple[DataParallel, Any]:
    """Return a model and its optimizer as Accelerate prepares them, for processes that each hold all weights.

    DDP is kept from sending buffers before its forwards: most are constants, and processes may differ in forwards.
    """
    names = [name for name, _ in model.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    return DataParallel(accelerator, wrapped), optimizer
