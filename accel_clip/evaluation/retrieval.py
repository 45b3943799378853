"""Retrieval: how high each picture ranks its own captions among all, and each caption its own pictures.

A query is right among the first k when any of its own candidates is (the convention of CLIP papers). Its rank is one
more than the number of candidates that are not its own and score at least as high as its best own one: equal scores
count against the hit, so a model that gives all the same score is last, not first.

Scores are products in float64, rounded to float32: candidates with equal features then score equal wherever they
stand in the matrix, TF32 has no say, and a CPU and a GPU agree.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy
import torch
from accelerate import Accelerator
from torch import Tensor

from accel_clip.process.waiting import UNWATCHED, Lookout

QUERIES_PER_CHUNK = 128  # with a million candidates, the scores of a chunk take 1 GiB
RECALL_AT = (1, 5, 10)


def retrieval_metrics(
    accelerator: Accelerator,
    image_features: Tensor,
    text_features: Tensor,
    image_of_pair: Tensor,
    text_of_pair: Tensor,
    lookout: Lookout = UNWATCHED,
) -> dict[str, float]:
    """Return recall at 1, 5 and 10 (0 to 1), mean rank and median rank (from 1) in both directions, by contract name.

    image_features: unit-norm [N, D]; text_features: unit-norm [M, D]; picture `image_of_pair[p]` and caption
    `text_of_pair[p]` belong together. Every picture and every caption must be in a pair.
    """
    to_text = ranks(accelerator, image_features, text_features, image_of_pair, text_of_pair, lookout)
    to_image = ranks(accelerator, text_features, image_features, text_of_pair, image_of_pair, lookout)
    return summary("val/image_to_text", to_text) | summary("val/text_to_image", to_image)


def names_of_retrieval() -> set[str]:
    """Return the names of all metrics in both directions."""
    one = torch.ones(1, dtype=torch.int64)
    return {*summary("val/image_to_text", one), *summary("val/text_to_image", one)}


def summary(name: str, ranks: Tensor) -> dict[str, float]:
    """Return the metrics of one direction."""
    recall = {f"{name}_R@{k}": recall_at(k, ranks) for k in RECALL_AT}
    median = float(numpy.median(ranks.numpy()))
    return recall | {f"{name}_mean_rank": ranks.double().mean().item(), f"{name}_median_rank": median}


def recall_at(k: int, ranks: Tensor) -> float:
    """Return the share of queries that are right among the first k."""
    return (ranks <= k).double().mean().item()


def ranks(
    accelerator: Accelerator,
    queries: Tensor,
    candidates: Tensor,
    query_of_pair: Tensor,
    candidate_of_pair: Tensor,
    lookout: Lookout = UNWATCHED,
) -> Tensor:
    """Return the rank of each query's best own candidate, int64 [Q] from 1, on the CPU of every process.

    queries: [Q, D]; candidates: [M, D]; candidate `candidate_of_pair[p]` is one of query `query_of_pair[p]`'s own.
    Chunks of queries are divided over the processes; memory grows with M. Raises `StopAsked` on all.
    """
    device = accelerator.device if accelerator.device.type == "cuda" else torch.device("cpu")  # MPS lacks float64
    query_of_pair, order = query_of_pair.sort()
    candidate_of_pair = candidate_of_pair[order]
    candidates = candidates.to(device, torch.float64)
    found = torch.zeros(len(queries), dtype=torch.int64, device=accelerator.device)
    for start in lookout.rounds(accelerator, range(0, len(queries), QUERIES_PER_CHUNK), "evaluation"):
        chunk = queries[start : start + QUERIES_PER_CHUNK].to(device, torch.float64)
        first, last = torch.searchsorted(query_of_pair, torch.tensor([start, start + len(chunk)])).tolist()
        own_query = (query_of_pair[first:last] - start).to(device)
        own_candidate = candidate_of_pair[first:last].to(device)
        found[start : start + len(chunk)] = chunk_ranks((chunk @ candidates.T).float(), own_query, own_candidate)
    return accelerator.reduce(found, "sum").cpu()


def chunk_ranks(scores: Tensor, own_query: Tensor, own_candidate: Tensor) -> Tensor:
    """Return the ranks of a chunk of queries, int64 [n]; scores: float32 [n, M]; own_*: row and column of each pair."""
    own = scores[own_query, own_candidate]
    best = scores.new_full((len(scores),), -torch.inf).scatter_reduce(0, own_query, own, "amax")
    ahead = ~(scores < best[:, None])  # a score that is not a number counts against the hit too
    ahead[own_query, own_candidate] = False
    return 1 + ahead.sum(dim=1)


@dataclass(frozen=True)
class NearestPictures:
    """A caption and the pictures that score highest for it."""

    text: int
    """number of the caption"""
    images: tuple[int, ...]
    """numbers of the pictures, best first"""
    own: tuple[bool, ...]
    """which of them are the caption's own"""


def nearest_examples(
    image_features: Tensor,
    text_features: Tensor,
    image_of_pair: Tensor,
    text_of_pair: Tensor,
    num_queries: int = 8,
    num_nearest: int = 5,
) -> list[NearestPictures]:
    """Return the nearest pictures of a few captions, the same captions every time: evenly spaced over all."""
    queries = torch.linspace(0, len(text_features) - 1, min(num_queries, len(text_features))).long()
    scores = (text_features[queries].double() @ image_features.double().T).float()
    nearest = scores.argsort(dim=1, descending=True, stable=True)[:, :num_nearest]
    examples = []
    for text, images in zip(queries.tolist(), nearest.tolist(), strict=True):
        own = set(image_of_pair[text_of_pair == text].tolist())
        examples.append(NearestPictures(text, tuple(images), tuple(image in own for image in images)))
    return examples
