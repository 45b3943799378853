"""A run's model as a folder that open_clip loads, and that folder on the hub."""

from __future__ import annotations

import json
from pathlib import Path

from accel_clip.checkpoint.contents import check_run
from accel_clip.checkpoint.find import find_best, find_whole
from accel_clip.command_line import config_in
from accel_clip.config import ModelConfig
from accel_clip.console import say
from accel_clip.faults import ConfigError, DataError
from accel_clip.files.kinds import EXPORT
from accel_clip.files.lock import LOCK
from accel_clip.files.marked import MARK, require_own, settle
from accel_clip.models.build import build_model
from accel_clip.models.export import (
    CONFIG,
    TOWERS,
    WEIGHTS,
    ExportedModel,
    copy_of_weights,
    exported_model,
    model_in,
    read_metrics,
    write_export,
)
from accel_clip.models.tower_files import ON_HUB, placed
from accel_clip.run.folder import RunFolder


def export_run(run: Path, to: Path | None) -> Path:
    """Write the model of a run, finished or stopped, as an export, by default into the run's folder, and return where.

    It is that of the best checkpoint where the run watches a metric, else of the newest; of the export that is there
    where no checkpoint is left. Raises `ConfigError` for a folder that holds neither, and for a place that holds
    anything but an export.
    """
    paths = RunFolder(run)
    folder = to or paths.export
    with paths.lock:
        if to is None and run.is_dir():
            paths.own()
        if not folder.is_symlink() or folder.exists():
            settle(folder.resolve().parent, folder.resolve())
        require_own(folder, EXPORT, "output_dir" if to is None else "--to")
        write_export(folder, model_of_run(paths))
    return folder


def model_of_run(paths: RunFolder) -> ExportedModel:
    """Return the model of a run from its checkpoints, or from its export where none is left."""
    saved = paths.read_config()
    watches = saved is not None and config_in(saved, paths.config).stop.metric is not None
    best = find_best(paths.checkpoints, check_run) if watches else None
    checkpoint = best or find_whole(paths.checkpoints, check_run)
    if checkpoint is not None:
        say(f"the {'newest' if best is None else 'best'} checkpoint: {checkpoint.path}")
        return model_in(checkpoint, is_best=best is not None)
    if not (paths.export / WEIGHTS).is_file():
        raise ConfigError(
            f"{paths.path} holds no checkpoint that is whole, and no exported model: name the folder of a run"
        )
    model = build_model(ModelConfig(name=f"local-dir:{paths.export}"))
    return exported_model(model, copy_of_weights(model), read_metrics(paths.export))


def push_to_hub(folder: Path, repository: str) -> str:
    """Upload an export to the hub and return its address; the token is the one `hf auth login` stored."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    described = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    towers = folder / TOWERS
    needs = json.loads(towers.read_text(encoding="utf-8")) if towers.is_file() else {}
    described["model_cfg"] = placed(described["model_cfg"], needs, repository, ON_HUB)
    try:
        interface = HfApi()
        interface.create_repo(repository, exist_ok=True)
        config = (json.dumps(described, indent=2) + "\n").encode()
        interface.upload_file(repo_id=repository, path_or_fileobj=config, path_in_repo=CONFIG)
        ignored = [MARK, LOCK, CONFIG]
        return str(interface.upload_folder(repo_id=repository, folder_path=folder, ignore_patterns=ignored))
    except (HfHubHTTPError, OSError) as error:
        raise DataError(f"--push {repository}: {error}") from error
