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
    """How a stream is read, and where its lanes stand."""

    num_shards: Count
    """shards of the stream"""
    num_pairs: Count
    """its pairs in a batch"""
    num_lanes: Annotated[int, Range(1, 1024)]
    """lanes into which its shards are dealt"""
    window: Annotated[int, Range(1, 10**9)]
    """items of a lane that are shuffled together"""
    marks: list[tuple[Count, Count, Count, Count, Count, Annotated[float, Range(0, 1)]]]
    """where each lane stands: the fields of `data.lanes.LanePosition`"""


@dataclass(frozen=True)
class DataState:
    """What tells whether the data is the same."""

    num_samples: Count
    """pairs of all sources that know them, 0 for streams alone"""
    streams: list[StreamState]
    """those of the run, in the order of the settings"""


@dataclass(frozen=True)
class MetersState:
    """Sums since the last point."""

    means: dict[str, tuple[float, float, float]]
    """value, sum and count of each mean, by name"""
    totals: dict[str, tuple[float]]
    """each total, by name"""


@dataclass(frozen=True)
class BadSamplesState:
    """What has been counted and listed of unusable samples."""

    counts: dict[str, Count]
    """how many different ones there were, by reason"""
    num_seen: Count
    """places of the order that all processes saw"""
    num_met: Count
    """those of them whose own sample was unusable"""
    num_missing: Count
    """those whose own sample was a missing file"""
    knows_the_root: bool
    """whether it has been looked at whether `data.image_root` is right"""
    listed: list[tuple[str, Count | str]]
    """source and sample of each that stands in the list"""


@dataclass(frozen=True)
class StoppingState:
    """The metric that is watched, as far as it has come."""

    best: float | None
    """its best value, None before the first"""
    best_step: Count | None
    """the step that it was measured at"""
    num_worse: Count | None
    """evaluations since then"""


@dataclass(frozen=True)
class PlanState:
    """How a batch is cut, and what that was decided for."""

    made_for: dict[str, Any]
    """the settings and the machine's share that it was decided for"""
    threads: Annotated[int, Range(1, 1024)]
    """of torch in a process"""
    micro_batch_size: Rows
    """rows that go through a tower at once"""
    captions_per_chunk: Rows
    """captions that are encoded at once"""
    kept: dict[str, Count]
    """graphs that are kept between the two passes, by side"""
    cost_of_a_group: Count
    """tokens: what a group of captions of one length costs beside its own"""
    stage: Count = 0
    """the stage of the run that it was made for"""


@dataclass(frozen=True)
class ModelState:
    """What the model's export says."""

    model_config: dict[str, Any]
    """the `model_cfg` of its `open_clip_config.json`"""
    preprocess_config: dict[str, Any]
    """the `preprocess_cfg` of it"""
    towers: dict[str, Any] = field(default_factory=dict)
    """the `config.json` of its towers"""


@dataclass(frozen=True)
class ModelSettings:
    """The `model` section of the settings."""

    name: str
    """`model.name`"""
    pretrained: str | None
    """`model.pretrained`"""
    options: dict[str, Any]
    """`model.options`"""
    freeze: list[str]
    """`model.freeze`"""


@dataclass(frozen=True)
class Settings:
    """The settings that the run was started with, of which an export needs the model's."""

    model: ModelSettings
    """the `model` section"""


@dataclass(frozen=True)
class SourceState:
    """Hashes of what a source held (`inputs.NamedSource`)."""

    written: str
    """what the settings name it by"""
    num_rows: Count
    """its rows, or shards"""
    names: str
    """hash of what pictures are called"""
    captions: str
    """hash of the captions"""
    pictures: str
    """hash of sizes, times and contents of pictures"""
    details: str
    """hash of the rows themselves, which a file holds"""


@dataclass(frozen=True)
class InputsState:
    """What the settings named by path."""

    sources: dict[str, SourceState]
    """by setting"""
    files: dict[str, str]
    """hashes of their contents, by setting"""


@dataclass(frozen=True)
class SavedState:
    """Everything beside weights, optimizer and random states that makes a resumed run the uninterrupted one."""

    run: RunState
    """counts and last results"""
    data: DataState
    """what tells whether the data is the same, and where streams stand"""
    meters: MetersState
    """sums since the last point"""
    bad_samples: BadSamplesState
    """unusable samples"""
    watched: str | None
    """the metric that is watched, None for none"""
    stopping: StoppingState
    """its best value"""
    config: Settings
    """the settings that the run was started with"""
    model: ModelState
    """what an export says beside weights"""
    plan: PlanState
    """how a batch is cut"""
    file_sizes: dict[str, Count]
    """bytes of the files that the run appends to, by name"""
    scaler: dict[str, float] | None
    """of the loss in float16, None in other precisions"""
    run_id: str | None = None
    """under which trackers know the run, None in a checkpoint of an earlier version"""
    resume: str | None = None
    """`checkpoint.resume` of the run that wrote it"""
    inputs: InputsState | None = None
    """what data and files held, None in a checkpoint of an earlier version"""
    hooks: dict[str, Any] = field(default_factory=dict)
    """what each hook keeps, by its name"""
