"""Results in float32 held to a reference: how far rounding may take them is derived, never guessed.

1. Where the reference can be computed in float64 too (`in_float64`), `assert_equal_to_rounding` allows a small multiple
   of its own distance from there.
2. Where it cannot, as for two whole runs, `rounding` says what another order of so many additions may change.

Either way a wrong recipe is far outside: a factor, a negative or a random number that is missing changes 1e-3 and more
(`test_comparison.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from statistics import median

import torch
from torch import Tensor

from accel_clip.models.build import ClipModel

EPSILON = torch.finfo(torch.float32).eps  # two roundings
TIMES = 16.0  # 2 to 5 were seen with 1 to 32 threads and the kernels of five kinds of processor
CERTAINTY = 6.0  # standard deviations
ADDITIONS_OF_A_STEP = 2500  # one after another: four blocks of width 32 forward and backward, patches, loss, batch


def assert_equal_to_rounding(
    given: Mapping[str, Tensor], single: Mapping[str, Tensor], exact: Mapping[str, Tensor]
) -> None:
    """Hold tensors to a reference by name: as far from `exact` as the same reference in their own precision is.

    single: the reference in the precision of `given`; exact: the reference in float64. A tensor of few numbers may come
    near by chance, so each may at least be as far, relative to its norm, as the tensors of the reference typically are.
    """
    assert given.keys() == single.keys() == exact.keys()
    norms = {name: each.norm().item() for name, each in exact.items()}
    errors = {name: distance(each, exact[name]) for name, each in single.items()}
    typical = median(errors[name] / norms[name] for name in exact if norms[name] > 0)
    for name, norm in norms.items():
        assert given[name].shape == exact[name].shape and given[name].dtype == single[name].dtype, name
        error, allowed = distance(given[name], exact[name]), TIMES * max(errors[name], typical * norm, EPSILON * norm)
        assert error <= allowed, f"{name}: {error:.2e} from float64, and {allowed:.2e} is allowed for rounding"


def distance(given: Tensor, exact: Tensor) -> float:
    return (given.double() - exact).norm().item()


def rounding(num_additions: int) -> float:
    """Return what another order of so many additions in float32 may change, relative to the sum of all magnitudes.

    Rounding errors are independent enough for λ √n u to hold (Higham and Mary 2019, SIAM J. Sci. Comput. 41, A2815);
    both results have theirs.
    """
    return CERTAINTY * num_additions**0.5 * EPSILON


def in_float64(model: ClipModel) -> ClipModel:
    """Return a copy of a model in float64."""
    return replace(model, clip=deepcopy(model.clip).double())
