"""What stands behind the progress bar."""

from __future__ import annotations

from accel_clip.console import Progress
from accel_clip.meters import AverageMeter, RateMeter

POINT = {"lr": 1e-4, "logit_scale": 14.2857, "data_time": 0.01, "step_time": 0.03}


def shown(loss: AverageMeter) -> str:
    """Return what the bar says after 64 pairs in half a second."""
    seconds = iter((0.0, 0.5))
    rate, progress = RateMeter("pairs/s", ":.0f", clock=lambda: next(seconds)), Progress()
    rate.update(64)
    progress.open(3)
    progress.show(loss, rate, POINT)
    progress.close()
    return progress.bar.postfix


def test_the_bar_shows_the_last_loss_and_their_mean() -> None:
    loss = AverageMeter("loss")
    loss.update(2.4)
    loss.update(2.2)
    assert shown(loss) == "loss 2.2000 (2.3000), lr 1.00e-04, scale 14.29, pairs/s 128, data 25%"


def test_the_bar_shows_no_loss_where_every_step_was_left_out() -> None:
    loss = AverageMeter("loss")
    loss.update(0.0, n=0)
    assert shown(loss).startswith("loss nan, lr ")
