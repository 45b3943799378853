"""A run's curves and retrieval examples as pictures."""

from __future__ import annotations

import json
from pathlib import Path

from accel_clip.command_line import load_config
from accel_clip.faults import ConfigError
from accel_clip.run_folder import RunFolder

PANELS = (
    ("loss", ("loss", "val/loss")),
    ("recall, captions to pictures", ("val/text_to_image_R@1", "val/text_to_image_R@5", "val/text_to_image_R@10")),
    ("learning rate", ("lr",)),
    ("logit scale", ("logit_scale",)),
)


def plot_run(run: Path, folder: Path) -> list[Path]:
    """Write `curves.png` and `retrieval.png` for a run and return them.

    The run's model and held-out part are opened again for the retrieval examples. Raises `ConfigError` for a folder
    that holds no finished run, and where matplotlib is missing.
    """
    paths = RunFolder(run)
    if not paths.metrics.is_file() or not paths.export.is_dir():
        raise ConfigError(f"{run} holds no finished run: name the folder of a run")
    folder.mkdir(parents=True, exist_ok=True)
    return [plot_curves(paths.metrics, folder / "curves.png"), plot_retrieval(paths, folder / "retrieval.png")]


def plot_curves(metrics: Path, picture: Path) -> Path:
    """Draw loss, recall, learning rate and logit scale over the steps of a `metrics.jsonl`."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("plots need matplotlib: pip install 'accel-clip[plots]'") from error
    points = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        for name in names:
            known = [(point["step"], point[name]) for point in points if name in point]
            if known:
                axes.plot(*zip(*known, strict=True), label=name, marker="." if len(known) < 30 else None)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        if len(names) > 1:
            axes.legend(fontsize="small")
    figure.savefig(picture, dpi=110)
    return picture


def plot_retrieval(paths: RunFolder, picture: Path) -> Path:
    """Draw a few held-out captions and the five pictures that the exported model finds nearest to each."""
    from dataclasses import replace

    from PIL import Image

    from accel_clip.config import ModelConfig
    from accel_clip.evaluation.command import evaluate_run

    config = load_config(paths.config)
    grid = evaluate_run(replace(config, model=ModelConfig(name=f"local-dir:{paths.export}"))).picture_grid()
    if grid is None:
        raise ConfigError(
            f"{paths.path}: the run held nothing out (data.val_fraction), so there is nothing to retrieve"
        )
    Image.fromarray(grid).save(picture)
    return picture
