"""The names that settings can take, each with one line about it."""

from __future__ import annotations

from accel_clip.plugins import load_plugins
from accel_clip.registry import Registry


def entries(kind: str, plugins: list[str]) -> list[tuple[str, str]]:
    """Return names and descriptions of what settings of a kind can name, one of the command's words."""
    load_plugins(plugins)
    if kind == "models":
        return models()
    if kind == "trackers":
        return trackers()
    if kind == "optimizers":
        from accel_clip.optim.optimizers import list_optimizers

        return list_optimizers()
    return [(entry.name, entry.description) for entry in registry_of(kind)]


def registry_of(kind: str) -> Registry:
    """Return the registry of evaluators, hooks, losses, schedules or sources, with what the package registers in it."""
    if kind == "evaluators":
        from accel_clip.evaluation.evaluator import EVALUATORS

        return EVALUATORS
    if kind == "hooks":
        from accel_clip.run.hooks import HOOKS

        return HOOKS
    from accel_clip.data.sources.base import SOURCES
    from accel_clip.data.sources.resolve import register_built_in
    from accel_clip.losses.base import LOSSES
    from accel_clip.optim.schedules import SCHEDULES

    register_built_in()
    return {"losses": LOSSES, "schedules": SCHEDULES, "sources": SOURCES}[kind]


def models() -> list[tuple[str, str]]:
    """Return the built-in model and open_clip's, with the tags of their weights."""
    import open_clip

    rows = [("tiny", "built in; trains on a CPU")]
    for name in open_clip.list_models():
        tags = open_clip.list_pretrained_tags_by_model(name)
        rows.append((name, "weights: " + ", ".join(tags) if tags else ""))
    return rows


def trackers() -> list[tuple[str, str]]:
    """Return the trackers, with the command that installs those that are not."""
    import importlib.util

    from accel_clip.run.tracking import PACKAGES

    return [
        (name, "installed" if importlib.util.find_spec(name) else f"pip install {package}")
        for name, package in sorted(PACKAGES.items())
    ]
