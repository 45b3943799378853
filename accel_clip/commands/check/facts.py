"""What a check finds out, as plain data: one dataclass a section of the report; sizes in bytes, times in seconds."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class RunFacts:
    """How long the run is and on what it runs; steps are the optimizer's.

    goes_on: a run in the folder is continued; num_held_out_trained: of those in `data.val`, the pairs whose pictures
    are trained on.
    """

    output_dir: str
    goes_on: bool
    device: str
    num_processes: int
    precision: str
    num_pairs: int | None
    num_held_out: int
    num_held_out_trained: int
    batch_size: int
    accumulate: int
    steps_per_epoch: float | None
    num_epochs: float | None
    num_steps: int
    num_warmup_steps: int
    steps_between_evaluations: float
    starting_loss: float


@dataclass(frozen=True)
class ModelFacts:
    """What is trained, and the memory of one process; parameters by tower: image, text, other."""

    name: str
    num_parameters: dict[str, int]
    num_trained: dict[str, int]
    image_size: tuple[int, int]
    context_length: int
    micro_batch_size: int
    num_micro_batches: int
    graphs_kept: dict[str, int]
    weights_bytes: int
    optimizer_bytes: int
    graph_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class DataFacts:
    """What a sample of the training pairs holds; shares are of the pairs looked at.

    num_unusable: by reason; examples: one unusable sample a reason; num_missing_files: those that another
    data.image_root might have; captions: a few of each source, as training sees them; the numbers of repeated ones
    count every pair after the first with the same picture or caption; num_file_names: captions that are names of
    picture files; picture_size: of the picture in the middle by its pixels; pairs_in_batch: of each of several sources,
    on average where it varies.
    """

    num_pairs: int | None
    num_looked_at: int
    num_unusable: dict[str, int]
    examples: dict[str, str]
    num_missing_files: int
    captions: dict[str, list[str]]
    unusable_share: float
    unusable_limit: float
    num_repeated_pictures: int
    num_repeated_captions: int
    num_cut_captions: int
    num_file_names: int
    token_limit: int
    picture_size: tuple[int, int] | None
    decoding_seconds: float
    pairs_in_batch: dict[str, float]


@dataclass(frozen=True)
class SpeedFacts:
    """Pairs a second of one process: of the loader alone by its number of workers, and of the step alone.

    step_pairs: how many pairs the step was measured with, from which a larger batch is computed; expected: what all
    processes can reach together.
    """

    num_workers: int
    loader: dict[int, float]
    step: float
    step_pairs: int
    bottleneck: str
    expected: float
    training_seconds: float


@dataclass(frozen=True)
class DiskFacts:
    """What the run writes at its largest; pictures: decoded ones, if they are to be kept, whether they fit or not."""

    checkpoint_bytes: int
    num_checkpoints: int
    export_bytes: int
    features_bytes: int
    pictures_bytes: int
    needed_bytes: int
    available_bytes: int


@dataclass(frozen=True)
class Problem:
    """What keeps a run from starting or from reaching its end, and the exit code that it stands for."""

    exit_code: int
    message: str


@dataclass(frozen=True)
class Report:
    """All that a check found; a section is None where a problem kept it from being looked at."""

    run: RunFacts | None = None
    model: ModelFacts | None = None
    data: DataFacts | None = None
    speed: SpeedFacts | None = None
    disk: DiskFacts | None = None
    warnings: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    exit_code: int = 0

    @property
    def verdict(self) -> str:
        """Return the last line of the report."""
        if self.problems:
            return f"not ready: {counted(len(self.problems), 'problem')}; exit code {self.exit_code}"
        return f"ready, with {counted(len(self.warnings), 'warning')}" if self.warnings else "ready"

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON has it."""
        return {"verdict": self.verdict, **asdict(self)}


def counted(number: int, word: str) -> str:
    """Return a number with its noun."""
    return f"{number} {word}" if number == 1 else f"{number} {word}s"
