"""What a check finds out, as plain data: one dataclass a section of the report; sizes in bytes, times in seconds."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class RunFacts:
    """How long the run is and on what it runs."""

    output_dir: str
    """its folder"""
    goes_on: bool
    """whether a run in the folder is continued"""
    device: str
    """the kind of device, such as cpu or cuda"""
    num_processes: int
    """those that will train"""
    precision: str
    """no, bf16, fp16 or fp8, as Accelerate has it"""
    num_pairs: int | None
    """pairs to train on, None where streams bring some"""
    num_held_out: int
    """pairs in `data.val`, 0 without any"""
    num_held_out_trained: int
    """those of them whose pictures are trained on"""
    batch_size: int
    """pairs of a contrastive batch, of all processes together"""
    accumulate: int
    """batches whose gradients an optimizer step averages"""
    steps_per_epoch: float | None
    """optimizer steps of one pass over the pairs, None where streams bring some"""
    num_epochs: float | None
    """passes over the pairs, None where streams bring some"""
    num_steps: int
    """optimizer steps of the run"""
    num_warmup_steps: int
    """those in which the learning rate rises"""
    steps_between_evaluations: float
    """optimizer steps from one to the next"""
    starting_loss: float
    """the contrastive loss of a model that cannot tell pairs apart"""


@dataclass(frozen=True)
class ModelFacts:
    """What is trained, and the memory of one process."""

    name: str
    """`model.name`"""
    num_parameters: dict[str, int]
    """parameters by tower: image, text, other"""
    num_trained: dict[str, int]
    """those of them that are trained, by tower"""
    image_size: tuple[int, int]
    """height and width of a picture in pixels"""
    context_length: int
    """tokens of a caption, 0 where the model does not say"""
    micro_batch_size: int
    """rows that go through a tower at once"""
    num_micro_batches: int
    """chunks of a process's part of a batch"""
    graphs_kept: dict[str, int]
    """chunks that keep their graph between the two passes, by side"""
    weights_bytes: int
    """what the weights take"""
    optimizer_bytes: int
    """what gradients and the optimizer's state take"""
    graph_bytes: int
    """what the graphs that are there at once take"""
    free_bytes: int
    """what graphs may take"""


@dataclass(frozen=True)
class DataFacts:
    """What a sample of the training pairs holds."""

    num_pairs: int | None
    """pairs to train on, None where streams bring some"""
    num_looked_at: int
    """pairs of the sample; the numbers below are of these"""
    num_unusable: dict[str, int]
    """unusable pairs by reason"""
    examples: dict[str, str]
    """one unusable sample a reason"""
    num_missing_files: int
    """unusable pairs that another `data.image_root` might have"""
    captions: dict[str, list[str]]
    """a few of each source, as training sees them"""
    unusable_share: float
    """unusable pairs as a share of the sample"""
    unusable_limit: float
    """the share above which a run stops, `data.max_bad_fraction`"""
    num_repeated_pictures: int
    """pairs after the first with the same picture"""
    num_repeated_captions: int
    """pairs after the first with the same caption"""
    num_cut_captions: int
    """captions with more tokens than the model reads"""
    num_file_names: int
    """captions that are names of picture files"""
    token_limit: int
    """tokens of a caption that the model reads, 0 without a usable pair"""
    picture_size: tuple[int, int] | None
    """width and height of the picture in the middle by its pixels, None without a usable pair"""
    decoding_seconds: float
    """what looking at one pair took"""
    pairs_in_batch: dict[str, float]
    """pairs of each of several sources in a batch, on average where it varies; empty for one source"""


@dataclass(frozen=True)
class SpeedFacts:
    """What is slower, the loader or the step, and how long training takes."""

    num_workers: int
    """workers of the loader as they are set, of one process"""
    loader: dict[int, float]
    """pairs a second of the loader alone, of one process, by its number of workers"""
    step: float
    """pairs a second of the step alone, of one process"""
    step_pairs: int
    """pairs that the step was measured with, from which a larger batch is computed"""
    bottleneck: str
    """loader or step"""
    expected: float
    """pairs a second that all processes can reach together"""
    training_seconds: float
    """what the run takes at that rate, without evaluations"""


@dataclass(frozen=True)
class DiskFacts:
    """What the run writes at its largest."""

    checkpoint_bytes: int
    """what one checkpoint takes"""
    num_checkpoints: int
    """checkpoints that are there at once"""
    export_bytes: int
    """what the exported model takes"""
    features_bytes: int
    """what the features of a frozen tower take, 0 where none are kept"""
    pictures_bytes: int
    """what decoded pictures take if they are to be kept, whether they fit or not"""
    needed_bytes: int
    """all of it together, with the pictures where they fit"""
    available_bytes: int
    """what is free where the run's folder is"""


@dataclass(frozen=True)
class Problem:
    """What keeps a run from starting or from reaching its end."""

    exit_code: int
    """the one that a run would end with"""
    message: str
    """what is wrong, and the way out"""


@dataclass(frozen=True)
class Report:
    """All that a check found; a section is None where a problem kept it from being looked at."""

    run: RunFacts | None = None
    """how long the run is and on what it runs"""
    model: ModelFacts | None = None
    """what is trained, and the memory of one process"""
    data: DataFacts | None = None
    """what a sample of the training pairs holds"""
    speed: SpeedFacts | None = None
    """what is slower, the loader or the step; None too where it is not to be measured"""
    disk: DiskFacts | None = None
    """what the run writes"""
    warnings: list[str] = field(default_factory=list)
    """what lets a run start and will hardly be meant"""
    problems: list[Problem] = field(default_factory=list)
    """what keeps it from starting or from reaching its end"""
    exit_code: int = 0
    """0 without problems, 3 when all of them are in the data, else 2"""

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
