"""Credentials and control characters kept out of what a person, a file or a tracker is shown."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from accel_clip.faults import ConfigError

MASK = "***"
SHORTEST_SECRET = 16  # characters; shorter values of variables are words that stand in texts by chance
SECRET_VARIABLE = re.compile(r"token|secret|password|passwd|api_?key|access_key|private_key", re.IGNORECASE)
SECRET_NAME = re.compile(
    r"token|secret|password|passwd|credentials?|(.*[_.-])?((auth|access|api|bearer|hf|hub|security|session)[_-]token"
    r"|secret|password|passwd|api_?key|access_key|secret_key|private_key)",
    re.IGNORECASE,
)
CREDENTIALS = (
    (re.compile(r"(\w://)[^/\s@'\"]+(?=@)"), rf"\1{MASK}"),  # user:password@host
    (
        re.compile(
            r"([?&](?:[\w.-]*(?:signature|credential|token|secret|passw|api_?key|access_?key|auth)[\w.-]*|sig|key)=)"
            r"(?!\*\*\*)[^&\s'\"#]+",
            re.IGNORECASE,
        ),
        rf"\1{MASK}",
    ),  # signed addresses
    (re.compile(r"\b(?:hf_[A-Za-z0-9]{20,}|gh[opsu]_[A-Za-z0-9]{30,}|A[KS]IA[0-9A-Z]{16})\b"), MASK),
)
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def masked(text: str) -> str:
    """Return a text without credentials: those in addresses, tokens of known form, and values of secret variables."""
    for pattern, replacement in CREDENTIALS:
        text = pattern.sub(replacement, text)
    for secret in secrets_of_environment():
        text = text.replace(secret, MASK)
    return text


def refuse_credentials(settings: Mapping[str, Any]) -> None:
    """Raise `ConfigError` naming a setting that holds a credential: settings go to the run folder and to trackers."""
    for key, text in texts_in(settings, ""):
        name = key.rpartition(".")[2]
        if masked(text) != text or (text and SECRET_NAME.fullmatch(name)):
            raise ConfigError(
                f"{key}: it holds a credential, and settings are stored in the run folder and shown by trackers: leave "
                "it out and set the variable that the library reads, such as HF_TOKEN, WANDB_API_KEY or "
                "AWS_SECRET_ACCESS_KEY, or download the data and name its path"
            )


def texts_in(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Yield the texts in nested settings, keys of dictionaries included, each with the dotted key it stands under."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield key or "settings", str(name)
            yield from texts_in(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, Sequence):
        for inner in value:
            yield from texts_in(inner, key)


def secrets_of_environment() -> list[str]:
    """Return the values of the variables whose names say that they are secret, the longest first."""
    named = (value for name, value in os.environ.items() if SECRET_VARIABLE.search(name))
    secrets = (value for value in named if len(value) >= SHORTEST_SECRET and not os.path.exists(value))
    return sorted(secrets, key=len, reverse=True)


def printable(text: str) -> str:
    """Return a text whose control characters are written out, since some make a terminal show what is not so."""
    return CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
