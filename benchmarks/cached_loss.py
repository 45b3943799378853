"""python benchmarks/cached_loss.py --captions captions.csv

Step time of accel_clip divided by that of sentence-transformers' CachedMultipleNegativesRankingLoss in its symmetric
form, on the two towers of one open_clip model; this benchmark alone needs `pip install "sentence-transformers>=6.2"`.
Same weights, pairs, threads, mini-batches, clipping and optimizer; the logit scale is fixed on both sides, because
theirs is not trained. Both gradients must agree before anything is timed. Counts of what a step computes come with it.

Theirs gets the fastest of its settings here: unit-norm features and their dot product, pictures that come normalised,
and, where captions are trimmed, an attention mask, by which it cuts every mini-batch to its longest caption. Its batch
stays in the order in which it comes; ours sorts captions by length and encodes equal ones once.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from counts import work_of
from timing import describe_machine, interleaved
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from trainers import LARGEST_NORM, SMALL, Ours, Scenario, make_batch, make_optimizer, new_model, normalised

from accel_clip.data.batch import Batch
from accel_clip.models.build import ClipModel
from accel_clip.models.freezing import freeze
from accel_clip.models.towers import caption_lengths, encode_image, encode_text

try:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
    from sentence_transformers.util import dot_score
except ImportError as missing:
    raise SystemExit(f'pip install "sentence-transformers>=6.2" to run this benchmark: {missing}') from missing

OTHER = "sentence-transformers"
SMALLEST_COSINE = 0.9999
SCENARIOS = [
    Scenario("every chunk run twice, nothing trimmed", SMALL, activation_gib=0, saves_tokens=False),
    Scenario("graphs kept as memory allows, nothing trimmed", SMALL, saves_tokens=False),
    Scenario("every chunk run twice, captions trimmed", SMALL, activation_gib=0),
    Scenario("graphs kept as memory allows, captions trimmed", SMALL),
]


class Towers(nn.Module):
    """An open_clip model as the one module of a SentenceTransformer; the features say which tower they are for."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the features with the unit-norm embedding [b, D] of their pictures or their captions."""
        if "pixel_values" in features:
            return {**features, "sentence_embedding": encode_image(self.clip, features["pixel_values"])}
        return {**features, "sentence_embedding": encode_text(self.clip, features["input_ids"])}


class SentenceTransformersSide:
    """The cached loss of sentence-transformers, and the step that makes use of its gradient."""

    def __init__(self, model: ClipModel, scenario: Scenario) -> None:
        self.clip, self.preprocess, self.saves_tokens = model.clip, model.preprocess_config, scenario.saves_tokens
        self.optimizer = make_optimizer(model.clip)
        self.loss = CachedMultipleNegativesRankingLoss(
            SentenceTransformer(modules=[Towers(model.clip)], device="cpu"),
            scale=model.clip.logit_scale.exp().item(),
            similarity_fct=dot_score,
            mini_batch_size=scenario.micro_batch_size,
            directions=("query_to_doc", "doc_to_query"),
            partition_mode="per_direction",
        )

    def columns(self, batch: Batch) -> list[dict[str, Tensor]]:
        """Return the pictures and the captions of a batch, by the names that the loss knows."""
        captions = {"input_ids": batch.tokens}
        if self.saves_tokens:
            places = torch.arange(batch.tokens.shape[1])
            captions["attention_mask"] = (places < caption_lengths(batch.tokens)[:, None]).long()
        return [{"pixel_values": normalised(batch.image, self.preprocess)}, captions]

    def on(self, batch: Batch) -> Callable[[], float]:
        """Return what takes one optimizer step on a batch and returns the loss."""
        columns = self.columns(batch)

        def step() -> float:
            loss = self.add_gradient(columns)
            nn.utils.clip_grad_norm_(self.clip.parameters(), LARGEST_NORM)
            self.optimizer.step()
            self.optimizer.zero_grad()
            return loss

        return step

    def add_gradient(self, columns: list[dict[str, Tensor]]) -> float:
        """Add the gradient of a batch to the parameters and return its loss."""
        self.loss.train()
        loss = self.loss(columns, labels=None)
        loss.backward()
        return loss.item()


def main() -> None:
    """Measure every scenario."""
    parser = argparse.ArgumentParser(description=f"Step time, ours divided by that of {OTHER}' cached loss")
    parser.add_argument("--captions", type=Path, help="CSV file with a column caption or title; made up without it")
    parser.add_argument("--batch-size", type=int, default=256, help="pairs in a step; mini-batches have 32")
    parser.add_argument("--pairs", type=int, default=5, help="times that each side is measured, at least 2")
    parser.add_argument("--threads", type=int, default=2, help="with 1, processor time is measured")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(describe_machine(OTHER), flush=True)
    for scenario in SCENARIOS:
        measure(replace(scenario, batch_size=given.batch_size), given.captions, given.pairs)


def measure(scenario: Scenario, captions: Path | None, num_pairs: int) -> None:
    """Print how well the gradients of one scenario agree, the ratio of times, and the counts of both sides."""
    model = new_model(scenario)
    freeze(model.clip, "logit_scale")
    theirs = SentenceTransformersSide(replace(model, clip=deepcopy(model.clip)), scenario)
    ours = Ours(model, scenario)
    batch = make_batch(model, scenario.batch_size, captions)
    agreement = compare_gradients(ours, theirs, batch)
    timing = interleaved(ours.on(batch), theirs.on(batch), num_pairs, OTHER)
    print(f"{scenario.label}: {timing}")
    print(f"    batch {len(batch)}, mini-batch {scenario.micro_batch_size}; {agreement}", flush=True)
    mine, other = (work_of(side.on(batch), side.clip) for side in (ours, theirs))
    for name, amount in mine.items():
        print(f"    {name}: {amount:.4g}, {OTHER} {other[name]:.4g}, ratio {amount / other[name]:.3f}", flush=True)


def compare_gradients(ours: Ours, theirs: SentenceTransformersSide, batch: Batch) -> str:
    """Return in words how well losses and gradients of a batch agree, which they must; leaves no gradient."""
    losses = ours.add_gradient(batch), theirs.add_gradient(theirs.columns(batch))
    mine, other = taken_gradient(ours.clip), taken_gradient(theirs.clip)
    cosine = cosine_similarity(mine, other, dim=0).item()
    norms = mine.norm().item(), other.norm().item()
    figures = (
        f"losses {losses[0]:.6f} and {losses[1]:.6f}, "
        f"gradients with cosine {cosine:.7f} and norm ratio {norms[0] / norms[1]:.7f}"
    )
    same = cosine > SMALLEST_COSINE and all(math.isclose(*each, rel_tol=1e-4) for each in (losses, norms))
    assert same, f"the sides do not train the same: {figures}"
    return figures


def taken_gradient(clip: nn.Module) -> Tensor:
    """Take the gradients from the trained parameters and return them as one vector in float64."""
    trained = [parameter for parameter in clip.parameters() if parameter.requires_grad]
    gradient = torch.cat([parameter.grad.flatten().double() for parameter in trained])
    clip.zero_grad()
    return gradient


if __name__ == "__main__":
    main()
