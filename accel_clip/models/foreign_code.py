"""Models and tokenizers that bring programs of their own: refused before anything asks about them or runs them.

1. What a description names in transformers or timm is looked at in the files that those would read: one that names
   code, in a folder or on the hub, is refused (`refuse_foreign_code`).
2. While anything is built, transformers neither asks nor imports (`without_foreign_code`), whatever was overlooked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from accel_clip.faults import ConfigError, one_line
from accel_clip.typed import Range, WrongValue, numbers_in

HUB_OF_TIMM = ("hf-hub:", "hf_hub:")
FOLDER_OF_TIMM = "local-dir:"
COUNTS = (
    (re.compile(r"(layer|block|expert|depth)s?(\[\d+\])?$"), Range(-256, 256)),  # below 0: counted from the end
    (re.compile(r"(^|[._])(num|n)_\w+$"), Range(0, 10**6)),
)
"""Counts, by their keys, of what is built or listed one by one: large ones take hours before anything fails."""


def refuse_foreign_code(name: str, model_config: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for a tower or tokenizer from elsewhere that brings code, or that never gets built.

    name: of the model, as open_clip takes it.
    """
    text = model_config["text_cfg"]
    sources = [text.get("hf_model_name"), tokenizer_source(name, text)]
    for source in dict.fromkeys(each for each in sources if each):
        for file, content in files_of_transformers(source):
            refuse_named_code(source, file, content)
    timm = model_config["vision_cfg"].get("timm_model_name") or ""
    if timm.startswith((*HUB_OF_TIMM, FOLDER_OF_TIMM)):
        refuse_named_code(timm, "config.json", builder_options_of_timm(timm))


def tokenizer_source(name: str, text: Mapping[str, Any]) -> str | None:
    """Return where open_clip takes a tokenizer of transformers from (open_clip/factory.py), None where it has its own.

    A model in a folder brings it there, whatever it is called.
    """
    named: str | None = text.get("hf_tokenizer_name")
    return name.removeprefix(FOLDER_OF_TIMM) if named and name.startswith(FOLDER_OF_TIMM) else named


def files_of_transformers(source: str) -> Iterator[tuple[str, Any]]:
    """Yield the files by which transformers chooses the classes that it builds, and what they hold.

    Those that are missing or cannot be had are left out: transformers says so itself.
    """
    try:
        from transformers import PreTrainedConfig
        from transformers.models.auto.tokenization_auto import get_tokenizer_config
        from transformers.utils import find_adapter_config_file
    except ImportError:  # then nothing of it is built
        return
    adapter = attempt(source, lambda: find_adapter_config_file(source))
    if adapter:
        yield "adapter_config.json", {"auto_map": "of the model that it is for"}
    yield "config.json", attempt(source, lambda: PreTrainedConfig.get_config_dict(source)[0])
    yield "tokenizer_config.json", attempt(source, lambda: get_tokenizer_config(source))


def builder_options_of_timm(source: str) -> Any:
    """Return what the configuration of a model of timm in a folder or on the hub tells its builder."""
    from timm.models import load_model_config_from_hf
    from timm.models._hub import load_model_config_from_path

    if source.startswith(FOLDER_OF_TIMM):
        return attempt(source, lambda: load_model_config_from_path(source.removeprefix(FOLDER_OF_TIMM))[2])
    return attempt(source, lambda: load_model_config_from_hf(source.partition(":")[2])[2])


def attempt(source: str, read: Any) -> Any:
    """Return what a library reads of a file, None where it is missing; raises `ConfigError` for what is none."""
    try:
        return read()
    except (OSError, ImportError):
        return None
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ConfigError(f"model.name: {source} cannot be read: {one_line(error)}") from error


def refuse_named_code(source: str, file: str, content: Any) -> None:
    """Raise `ConfigError` for a file that names code, or counts of parts that nothing has."""
    key = code_in(content)
    where = str(Path(source) / file) if Path(source).is_dir() else f"{file} of {source}"
    if key is not None:
        raise ConfigError(
            f"model.name: {where} names programs of its own ({key}), which are not run: use a model whose code is in "
            f"transformers, or take '{key}' out where transformers has that code"
        )
    try:
        for name, number in numbers_in(content, ""):
            for words, limits in COUNTS:
                if words.search(name) and isinstance(number, int) and not limits.holds(number):
                    raise WrongValue(name, number, f"it must be {limits.words}")
    except WrongValue as error:
        raise ConfigError(f"model.name: {where}: {error}") from error


def code_in(content: Any) -> str | None:
    """Return the key that names code in nested settings of transformers, None where there is none."""
    rest = [content]
    while rest:
        value = rest.pop()
        if isinstance(value, Mapping):
            for key, inner in value.items():
                is_kernel = str(key).endswith("_implementation") and "/" in str(inner)
                if inner and (key in ("auto_map", "trust_remote_code") or is_kernel):
                    return str(key)
            rest.extend(value.values())
        elif isinstance(value, (list, tuple)):
            rest.extend(value)
    return None


@contextmanager
def without_foreign_code() -> Iterator[None]:
    """Let transformers neither ask whether to run code that comes with a model, nor import it."""
    try:
        from transformers import dynamic_module_utils as foreign
    except ImportError:
        yield
        return
    before = foreign.TIME_OUT_REMOTE_CODE, foreign.get_class_in_module
    foreign.TIME_OUT_REMOTE_CODE, foreign.get_class_in_module = 0, refuse_import
    try:
        yield
    finally:
        foreign.TIME_OUT_REMOTE_CODE, foreign.get_class_in_module = before


def refuse_import(*words: Any, **more: Any) -> NoReturn:
    """Raise ValueError in place of importing code that came with a model."""
    raise ValueError(f"{words[:2]} is code that came with a model, which is not run")
