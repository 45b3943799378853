"""Signs that a run goes wrong: a loss that learns nothing, a step that waits, features that collapse, a high rate."""

from __future__ import annotations

import math
from collections.abc import Mapping

from accel_clip.config import Config
from accel_clip.console import say

HIGH_RATE_FOR_WEIGHTS = 5e-5
STEPS_BEFORE_A_JUDGEMENT = 200
CHANCE_MARGIN = 0.02  # below ln(batch), in nats: a loss that has learnt anything is further down
COLLAPSED_COSINE = 0.98
LONG_WAIT = 0.1  # of the time of a step
POINTS_TO_KNOW_A_WAIT = 3  # in a row


class ChanceWatch:
    """Tells once when the contrastive loss stays where a model that knows nothing stands, ln(batch)."""

    def __init__(self, batch_size: int) -> None:
        self.chance, self.told = math.log(batch_size), False

    def look(self, step: int, point: dict[str, float]) -> None:
        """Take in a training point; its loss is the mean of the steps since the last one."""
        loss = point.get("loss/contrastive_loss")
        if self.told or loss is None or step < STEPS_BEFORE_A_JUDGEMENT or abs(loss - self.chance) > CHANCE_MARGIN:
            return
        self.told = True
        say(
            f"warning: after {step} steps the loss is {loss:.3f}, where a model that knows nothing stands "
            f"(ln of the batch size is {self.chance:.3f}): raise optim.lr or lengthen the run, or look whether "
            "captions belong to their pictures"
        )


class WaitWatch:
    """Tells once when the step keeps waiting for data; the first point is left out, when workers were starting."""

    def __init__(self, num_workers: int, num_cores: int) -> None:
        self.num_workers, self.num_cores = num_workers, num_cores
        self.num_points, self.num_waits, self.told = 0, 0, False

    def look(self, step: int, point: dict[str, float]) -> None:
        """Take in a training point, whose times are those of a step."""
        waiting, whole = point["data_time"], point["data_time"] + point["step_time"]
        waits = self.num_points > 0 and waiting > LONG_WAIT * whole
        self.num_points += 1
        self.num_waits = self.num_waits + 1 if waits else 0
        if self.told or self.num_waits < POINTS_TO_KNOW_A_WAIT:
            return
        self.told = True
        say(
            f"warning: at step {step} {waiting / whole:.0%} of the time is waiting for data ({waiting:.3f} of "
            f"{whole:.3f} seconds a step): raise data.workers (now {self.num_workers}, {self.num_cores} cores), store "
            "smaller pictures, or keep decoded ones by data.image_cache_gib (not of streams); accel-clip check "
            "measures loader and step"
        )


def warn_of_collapse(step: int, mean_cosines: Mapping[str, float]) -> None:
    """Say when the features of different pictures, or captions, all point the same way after many steps."""
    for name, mean_cosine in mean_cosines.items():
        if step >= STEPS_BEFORE_A_JUDGEMENT and mean_cosine > COLLAPSED_COSINE:
            say(
                f"warning: at step {step} the features of different {name} are nearly equal (mean cosine "
                f"{mean_cosine:.3f}): lower optim.lr, or look whether the data is varied"
            )


def rate_warning(config: Config) -> str | None:
    """Return what to say of a learning rate that trained weights do not bear, None where none is as high."""
    by_name = {name: rate for name, rate in config.optim.lr_by_name.items() if not name.startswith("logit")}
    rates = {f"optim.lr_by_name.{name}": rate for name, rate in by_name.items()}
    if not {"image", "text"} <= set(by_name):
        rates["optim.lr"] = config.optim.peak_lr
    key = max(rates, key=lambda name: rates[name])
    if not config.model.trains_weights or rates[key] <= HIGH_RATE_FOR_WEIGHTS:
        return None
    return (
        f"{key}: {rates[key]:g} is far above what trained weights bear: they forget what they know; 1e-5 is usual, "
        f"up to {HIGH_RATE_FOR_WEIGHTS:g} may do (recipes/finetune.yaml)"
    )
