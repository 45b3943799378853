"""What `state.json` of a checkpoint holds, by the parts of a run that put it there: whoever reads it checks it first.

Names are those of the parts' own `state_dict`; what stands there beside them is not looked at.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from accel_clip.checkpoint.run_state import RunState
from accel_clip.typed import Count, Range

Rows = Annotated[int, Range(1, 2**24)]


@dataclass(frozen=True)
class StreamState:
    """How a stream is read, and where its lanes stand (`data.lanes.Mark`)."""

    num_shards: Count
    num_pairs: Count
    num_lanes: Annotated[int, Range(1, 1024)]
    window: Annotated[int, Range(1, 10**9)]
    marks: list[tuple[Count, Count, Count, Count, Count, Annotated[float, Range(0, 1)]]]


@dataclass(frozen=True)
class DataState:
    """What tells whether the data is the same."""

    num_samples: Count
    streams: list[StreamState]


@dataclass(frozen=True)
class MetersState:
    """Sums since the last point: value, sum and count of each mean, and totals."""

    means: dict[str, tuple[float, float, float]]
    totals: dict[str, tuple[float]]


@dataclass(frozen=True)
class BadSamplesState:
    """What has been counted and listed of unusable samples."""

    counts: dict[str, Count]
    num_seen: Count
    num_met: Count
    num_missing: Count
    knows_the_root: bool
    listed: list[tuple[str, Count | str]]


@dataclass(frozen=True)
class StoppingState:
    """The best value of the metric that is watched, None before the first."""

    best: float | None
    best_step: Count | None
    num_worse: Count | None


@dataclass(frozen=True)
class PlanState:
    """How a batch is cut, and what that was decided for."""

    made_for: dict[str, Any]
    threads: Annotated[int, Range(1, 1024)]
    micro_batch_size: Rows
    captions_per_chunk: Rows
    kept: dict[str, Count]
    cost_of_a_group: Count


@dataclass(frozen=True)
class ModelState:
    """The two halves of the model's `open_clip_config.json`, and the `config.json` of its towers."""

    model_config: dict[str, Any]
    preprocess_config: dict[str, Any]
    towers: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelSettings:
    """The `model` section of the settings."""

    name: str
    pretrained: str | None
    options: dict[str, Any]
    freeze: list[str]


@dataclass(frozen=True)
class Settings:
    """The settings that the run was started with, of which an export needs the model's."""

    model: ModelSettings


@dataclass(frozen=True)
class SourceState:
    """Hashes of what a source held, and its rows (`inputs.NamedSource`)."""

    written: str
    num_rows: Count
    names: str
    captions: str
    pictures: str
    details: str


@dataclass(frozen=True)
class InputsState:
    """What the settings named by path: sources, and hashes of files, by setting."""

    sources: dict[str, SourceState]
    files: dict[str, str]


@dataclass(frozen=True)
class SavedState:
    """Everything beside weights, optimizer and random states that makes a resumed run the uninterrupted one."""

    run: RunState
    data: DataState
    meters: MetersState
    bad_samples: BadSamplesState
    watched: str | None
    stopping: StoppingState
    config: Settings
    model: ModelState
    plan: PlanState
    file_sizes: dict[str, Count]
    scaler: dict[str, float] | None
    run_id: str | None = None
    resume: str | None = None
    """`checkpoint.resume` of the run that wrote it"""
    inputs: InputsState | None = None
