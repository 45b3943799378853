"""One exact contrastive step: the gradient of the global batch's loss, however the batch is cut.

1. ChunkedBatch this process's pairs into chunks of pictures and chunks of captions (`step/chunks.py`).
2. First pass: the features of every chunk. The last chunks keep their graph, as the plan says; the others run without
   gradient and remember the state of the random number generators. Frozen towers only ever need this.
3. The loss of the whole batch and its gradient by this process's features, once (`losses/gradient.py`).
4. Second pass: kept graphs are back-propagated, the newest first; the other chunks run again with their randomness
   replayed. Gradients are reduced over processes in the last backward pass alone, which reaches every parameter.

With T the forward cost of a pair this costs 3T where graphs are kept and 4T where they are not, the loss once, and one
reduction of gradients. The method is GradCache's (Gao et al. 2021, arXiv 2101.06983, section 3) with graphs kept as
memory allows and the gradient of the logit scale taken once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from accel_clip.data.batch import Batch
from accel_clip.losses.base import Loss
from accel_clip.losses.gradient import (
    SCALARS,
    LossGradient,
    global_loss_gradient,
    rows_surrogate,
    scalars_surrogate,
)
from accel_clip.losses.pair_terms import PairTerms
from accel_clip.models.anatomy import Anatomy
from accel_clip.models.data_parallel import DataParallel, Outputs
from accel_clip.process.transfer import to_device
from accel_clip.randomness import RandomState
from accel_clip.step.chunks import Chunk, ChunkedBatch, Plan, cut_batch


class ContrastiveStep:
    """The step of a run: what stays the same from batch to batch.

    parallel: the wrapped model, called with `image=…` and `text=…`, and the reduction of its gradients.
    """

    def __init__(self, parallel: DataParallel, loss: Loss, anatomy: Anatomy, plan: Plan) -> None:
        self.parallel, self.loss, self.anatomy, self.plan = parallel, loss, anatomy, plan
        self.accelerator = parallel.accelerator
        self.wanted = loss.wanted()
        self.wanted_with_graph = None if self.wanted is None else {*self.wanted, *loss.pair_outputs()}

    def __call__(self, batch: Batch) -> Outputs:
        """Add the gradient of one contrastive batch to the parameters and return the terms of its global loss.

        batch: this process's pairs, on the CPU; every process brings the same number.
        """
        device, loss = self.accelerator.device, self.loss
        chunked = cut_batch(batch, self.anatomy, self.plan).on(device)
        known = {name: to_device(each, device) for name, each in batch.features.items()}
        columns = loss.columns(batch, device)
        passed = FirstPass(self, chunked)
        outputs = {**columns, **passed.outputs(), **known}
        gradient = global_loss_gradient(self.accelerator, loss, outputs)
        pair_terms = PairTerms(self.accelerator, loss, batch)
        self.second_pass(passed, gradient, pair_terms)
        return {**gradient.terms, **pair_terms.values}

    def forward(self, chunk: Chunk) -> Outputs:
        """Return the model's outputs for a chunk."""
        inputs = chunk.inputs_on(self.accelerator.device)
        wanted = self.wanted_with_graph if torch.is_grad_enabled() else self.wanted
        return self.parallel.forward(**inputs, wanted=wanted)

    def trained(self, chunks: list[Chunk]) -> list[int]:
        """Return the numbers of the chunks that need a gradient; the last one where only the scalars are trained."""
        return [number for number, chunk in enumerate(chunks) if not chunk.is_frozen(self.anatomy)] or [len(chunks) - 1]

    def second_pass(self, passed: FirstPass, gradient: LossGradient, pair_terms: PairTerms) -> None:
        """Back-propagate the gradient of the loss through every chunk, those with a graph first.

        The last backward pass takes one chunk of each side, the scalars and the loss's own parameters, so it reaches
        every trained parameter, as the reduction needs.
        """
        chunks = passed.chunked.chunks
        slopes = {name: passed.chunked.to_items(name, slope) for name, slope in gradient.by_row.items()}
        order = sorted(self.trained(chunks), key=lambda number: (number not in passed.kept, -number))
        final = last_of_each_side(order, chunks)

        def surrogate(number: int, outputs: Outputs) -> Tensor:
            rows = rows_surrogate(self.accelerator.num_processes, chunks[number].rows, outputs, slopes)
            return rows + pair_terms.surrogate(outputs)

        for number in order:
            if number not in final:
                with self.parallel.alone():
                    self.accelerator.backward(surrogate(number, passed.graph_of(number)))
        outputs = {number: passed.graph_of(number) for number in final}
        summands = [surrogate(number, outputs[number]) for number in final]
        summands.append(scalars_surrogate(self.loss, outputs[final[-1]], gradient))
        with self.parallel.reduced():
            self.accelerator.backward(torch.stack(summands).sum())


class FirstPass:
    """The features of every chunk, and what the second pass needs of each: its graph, or its random state."""

    def __init__(self, step: ContrastiveStep, chunked: ChunkedBatch) -> None:
        self.step, self.chunked = step, chunked
        self.kept: dict[int, Outputs] = {}
        self.random_states: dict[int, RandomState] = {}
        self.rows: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self.scalars: Outputs = {}
        trained = set(step.trained(chunked.chunks))
        keeping = chunks_to_keep(chunked.chunks, sorted(trained), step.plan)
        for number, chunk in enumerate(chunked.chunks):
            if number in keeping:
                outputs = self.kept[number] = step.forward(chunk)
            else:
                outputs = self.without_graph(number, chunk, runs_again=number in trained)
            self.take(chunk, outputs)

    def without_graph(self, number: int, chunk: Chunk, runs_again: bool) -> Outputs:
        """Return the outputs of a chunk without a graph; what it draws can be drawn again."""
        if runs_again and self.step.anatomy.stochastic:
            self.random_states[number] = RandomState(self.step.accelerator.device)
        with torch.no_grad(), unchanged_statistics(self.step.parallel.model) if runs_again else nullcontext():
            return self.step.forward(chunk)

    def take(self, chunk: Chunk, outputs: Outputs) -> None:
        """Take in what the global loss sees of a chunk, detached: features, and the scalars."""
        for name, value in outputs.items():
            if name in SCALARS:
                self.scalars[name] = value.detach()
            elif self.step.wanted is None or name in self.step.wanted:
                self.rows.setdefault(name, []).append((chunk.rows, value.detach()))

    def outputs(self) -> Outputs:
        """Return the outputs of this process's whole batch by name, one row a pair, and the scalars."""
        whole = {name: self.chunked.to_pairs(name, in_order(parts)) for name, parts in self.rows.items()}
        return {**whole, **self.scalars}

    def graph_of(self, number: int) -> Outputs:
        """Return the outputs of a chunk with their graph: the one that was kept, or that of a second run."""
        if number in self.kept:
            return self.kept.pop(number)
        state = self.random_states.pop(number, None)
        with state.replayed() if state is not None else nullcontext():
            return self.step.forward(self.chunked.chunks[number])


def chunks_to_keep(chunks: list[Chunk], trained: list[int], plan: Plan) -> set[int]:
    """Return the numbers of the chunks whose graph is kept: the last ones of each side."""
    by_side = {side: [number for number in trained if side == chunks[number].side] for side in plan.kept}
    return {number for side, numbers in by_side.items() for number in numbers[max(0, len(numbers) - plan.kept[side]) :]}


def last_of_each_side(order: list[int], chunks: list[Chunk]) -> list[int]:
    """Return the last number of each side in an order of chunks."""
    last = {chunks[number].side: number for number in order}
    return list(last.values())


def in_order(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the rows of all parts where they belong."""
    values = torch.cat([value for _, value in parts])
    places = torch.cat([rows for rows, _ in parts])
    return torch.empty_like(values).index_copy_(0, places, values)


@contextmanager
def unchanged_statistics(model: nn.Module) -> Iterator[None]:
    """Leave the running statistics of batch norm as they were before the block: a chunk that runs twice counts once."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    before = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.copy_(value)
