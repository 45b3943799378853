"""A run's curves and retrieval examples as pictures."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

from accel_clip.command_line import load_config
from accel_clip.faults import ConfigError, StorageError
from accel_clip.files.whole import write_bytes
from accel_clip.run.folder import RunFolder
from accel_clip.typed_json import WrongContent, parse_json

SOFTWARE = "accel_clip"
"""What a PNG of ours says it was made by; another one is not replaced."""

PANELS = (
    ("loss", ("loss", "val/loss")),
    ("recall, captions to pictures", ("val/text_to_image_R@1", "val/text_to_image_R@5", "val/text_to_image_R@10")),
    ("learning rate", ("lr",)),
    ("logit scale", ("logit_scale",)),
)


def plot_run(run: Path, folder: Path) -> list[Path]:
    """Write `curves.png` and `retrieval.png` for a run and return them.

    The run's model and held-out part are opened again for the retrieval examples. Raises `ConfigError` for a folder
    that holds no finished run, for a picture there that is not one of ours, and where matplotlib is missing.
    """
    paths = RunFolder(run)
    if not paths.metrics.is_file() or not paths.export.is_dir():
        raise ConfigError(f"{run} holds no finished run: name the folder of a run")
    for name in ("curves.png", "retrieval.png"):
        require_own_picture(folder / name)
    folder.mkdir(parents=True, exist_ok=True)
    return [plot_curves(paths.metrics, folder / "curves.png"), plot_retrieval(paths, folder / "retrieval.png")]


def require_own_picture(picture: Path) -> None:
    """Raise `ConfigError` where a picture that we have not drawn would be replaced."""
    from PIL import Image, UnidentifiedImageError

    if not picture.exists():
        return
    try:
        with Image.open(picture) as opened:
            is_own = opened.info.get("Software") == SOFTWARE
    except (OSError, UnidentifiedImageError):
        is_own = False
    if not is_own:
        raise ConfigError(f"--to: {picture} is not a plot of ours: move it away, or name another folder")


def write_picture(picture: Path, png: BytesIO) -> Path:
    """Replace a picture in one go and return it; raises `StorageError`."""
    try:
        write_bytes(picture, png.getvalue())
    except OSError as error:
        raise StorageError(f"{picture}: {error}") from error
    return picture


def read_points(metrics: Path) -> list[dict[str, float | None]]:
    """Return the points of a `metrics.jsonl`, each with its step; raises `ConfigError` naming the line that is none."""
    points = []
    try:
        for number, line in enumerate(metrics.read_bytes().splitlines(), start=1):
            point = parse_json(line, dict[str, float | None], f"line {number}")
            if point.get("step") is None:
                raise WrongContent(f"line {number}: step: it is missing")
            points.append(point)
    except (OSError, WrongContent) as error:
        raise ConfigError(f"{metrics}: {error}: mend or remove the line") from error
    return points


def plot_curves(metrics: Path, picture: Path) -> Path:
    """Draw loss, recall, learning rate and logit scale over the steps of a `metrics.jsonl`."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("plots need matplotlib: pip install 'accel-clip[plots]'") from error
    points = read_points(metrics)
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        for name in names:
            known = [(point["step"], point[name]) for point in points if point.get(name) is not None]
            if known:
                axes.plot(*zip(*known, strict=True), label=name, marker="." if len(known) < 30 else None)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        if len(names) > 1:
            axes.legend(fontsize="small")
    png = BytesIO()
    figure.savefig(png, dpi=110, format="png", metadata={"Software": SOFTWARE})
    return write_picture(picture, png)


def plot_retrieval(paths: RunFolder, picture: Path) -> Path:
    """Draw a few held-out captions and the five pictures that the exported model finds nearest to each."""
    from dataclasses import replace

    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    from accel_clip.commands.evaluate import evaluate_run
    from accel_clip.config import ModelConfig

    config = load_config(paths.config)
    grid = evaluate_run(replace(config, model=ModelConfig(name=f"local-dir:{paths.export}"))).picture_grid()
    if grid is None:
        raise ConfigError(
            f"{paths.path}: the run held nothing out (data.val_fraction), so there is nothing to retrieve"
        )
    png, about = BytesIO(), PngInfo()
    about.add_text("Software", SOFTWARE)
    Image.fromarray(grid).save(png, format="png", pnginfo=about)
    return write_picture(picture, png)
