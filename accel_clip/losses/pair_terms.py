"""Terms of a loss that are sums over pairs: computed chunk by chunk, divided by a count over the global batch."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor

from accel_clip.data.batch import Batch
from accel_clip.losses.base import Loss, total
from accel_clip.process.transfer import to_device


class PairTerms:
    """The pair terms of one batch; collective for a loss that has them, which counts over all processes first.

    values: the terms of the chunks so far, detached; their mean over processes is that of the global batch. A mean over
    chunks of what each chunk's pairs have on average would be another objective.
    """

    def __init__(self, accelerator: Accelerator, loss: Loss, batch: Batch) -> None:
        self.loss, self.names = loss, loss.pair_outputs()
        self.values: dict[str, Tensor] = {}
        if self.names:
            count = to_device(torch.as_tensor(loss.function.pair_count(batch)), accelerator.device)
            self.factor = accelerator.num_processes / accelerator.reduce(count, "sum").clamp_min(1)

    def surrogate(self, outputs: dict[str, Tensor]) -> Tensor:
        """Return a scalar whose gradient, averaged over processes as DDP does, is that of the terms of these outputs.

        outputs: what the model returned for a chunk, with its graph; a chunk without what the terms need adds nothing.
        """
        if not self.names or not all(name in outputs for name in self.names):
            return next(iter(outputs.values())).new_zeros(())
        terms = {name: self.factor * value for name, value in self.loss.pair_terms(outputs).items()}
        for name, value in terms.items():
            self.values[name] = self.values.get(name, 0) + value.detach()
        return total(terms)
