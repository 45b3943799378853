"""Credentials and control characters kept out of what a person, a file or a tracker is shown.

1. A credential is known by its name in an address (`?token=`, `;pwd=`, `#access_token=`), however that is written, by
   its place (`user:password@host`), by the form that its issuer gives it (`ghp_…`), or as a secret variable's value.
2. Settings that hold one are refused, every other text is shown with `***` in its place.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import unquote

from accel_clip.faults import ConfigError

MASK = "***"
SHORTEST_SECRET = 16  # characters; shorter values of variables are words that stand in texts by chance
MOST_ENCODINGS = 3  # one around the other
SECRET_VARIABLE = re.compile(
    r"token|secret|password|passwd|passphrase|(api|access|private|account|shared)_?key|jwt|bearer|connection_string|_pat$",
    re.IGNORECASE,
)
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

USERS = re.compile(r"(\w://)[^/\s@'\"]+(?=@)|(//)[^/\s@'\":]*:[^/\s@'\"]*(?=@)")
PARAMETER = re.compile(r"[?&;#]([^?&;#=/\s'\"]{1,200})=")
VALUE = re.compile(r"[^&;#\s'\"]+")
ENCODED = re.compile(r"(?<!\S)[^\s%]*%\S*")
WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")  # of apiKey, API-KEY, api_key and api.key

SECRET_END = re.compile(
    r"(token|secret|password|passwd|passphrase|passcode|signature|credentials?|jwt|hmac|(api|auth|access|secret|private"
    r"|account|shared|signing)key|accesskeyid|authorization|bearer|sess(ion)?id|cookie|hdn(ts|ea|tl))[0-9]*$"
)
SECRET_WORDS = frozenset(("pwd", "pass", "pw", "sig", "sas", "auth", "oauth"))
SECRET_NAMES = frozenset(("key", "sid"))
"""Names of parameters of addresses: how they end, the words that are their last, and those that are all of it."""

SECRET_OPTION = re.compile(
    r"token|(.*_)?((auth|access|api|bearer|hf|hub|security|session|refresh|github|gitlab|wandb|sas)_?token|secret|pwd"
    r"|passw(or)?d|passphrase|credentials?|(api|auth|access|secret|private|account)_?key|jwt|cookie|authorization"
    r"|session_?id|connection_?string)|((user|db|proxy)_)?pass|passcode|bearer"
)

FORMS = (
    *(r"gh[opsur]_[A-Za-z0-9]{30,}", r"github_pat_\w{20,}"),
    r"gl(?:pat|dt|rt|ft|ptt|cbt|imt|soat|oas|ffct|agent)-[\w-]{16,}",  # GitLab
    *(r"xox[abceprs][.-](?=[\w-]*\d)[\w-]{10,}", r"xapp-[\w-]{16,}", r"hooks\.slack\.com/services/[\w/]{16,}"),
    *(
        r"sk-(?:proj|svcacct|admin|ant|or|lf)-(?=[\w-]*\d)[\w-]{16,}",
        r"sk-[A-Za-z0-9]{32,}",
        r"[rsp]k_(?:live|test)_\w{16,}",
    ),
    *(r"npm_[A-Za-z0-9]{24,}", r"pypi-Ag[\w-]{30,}", r"dckr_[a-z]{3}_[\w-]{16,}"),
    *(r"AIza[\w-]{30,}", r"ya29\.[\w-]{20,}", r"GOCSPX-[\w-]{20,}"),  # Google
    *(r"hf_[A-Za-z0-9]{20,}", r"api_org_[A-Za-z0-9]{20,}", r"wandb_v1_\w{20,}", r"KGAT_\w{20,}"),
    *(r"A(?:KIA|SIA|BIA|CCA)[0-9A-Z]{16}", r"LTAI[A-Za-z0-9]{16,}", r"do[opr]_v1_[a-f0-9]{32,}"),
    *(r"gsk_[A-Za-z0-9]{30,}", r"pplx-[A-Za-z0-9]{30,}", r"xai-[A-Za-z0-9]{40,}", r"r8_[A-Za-z0-9]{30,}"),
    *(r"nvapi-[\w-]{20,}", r"dapi[a-f0-9]{32}", r"hv[sb]\.[\w-]{20,}", r"tskey-[\w-]{16,}", r"ATATT3[\w=-]{20,}"),
    *(r"SG\.[\w-]{16,}\.[\w-]{16,}", r"glsa_\w{20,}", r"ntn_[A-Za-z0-9]{30,}", r"[0-9]{8,10}:AA[\w-]{33}(?!\w)"),
    *(r"eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]*", r"AGE-SECRET-KEY-1[0-9A-Z]{30,}"),
)
"""Tokens as their issuers write them: what is theirs alone, so that no path, name or hash is taken for one.

They are those of gitleaks' rules that need no word beside them, and of the services that trainings use. No package has
them as they are needed here: detect-secrets 1.5 lacks half of the kinds, starts `requests` and takes folder names for
keys; those around gitleaks and kingfisher bring 50 MB each, for some machines only, or take four seconds to start.
"""

TOKENS = re.compile(rf"(?<![A-Za-z0-9])(?:{'|'.join(FORMS)})")
HEADERS = re.compile(
    r"(authorization['\"]?\s*[:=]\s*['\"]?(?:\w+\s+)?|bearer\s+(?=\S*\d))(?!\*\*\*)[\w.~+/=-]{16,}", re.IGNORECASE
)
PRIVATE_KEYS = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL)


def masked(text: str) -> str:
    """Return a text without credentials; a word that hides one by percent signs is shown decoded."""
    return ENCODED.sub(lambda word: decoded_if_secret(word[0]), masked_as_written(text))


def masked_as_written(text: str) -> str:
    """Return a text without the credentials that stand in it as they are."""
    text = USERS.sub(rf"\1\2{MASK}", text)
    text = with_masked_parameters(text)
    text = HEADERS.sub(rf"\1{MASK}", PRIVATE_KEYS.sub(MASK, TOKENS.sub(MASK, text)))
    for secret in secrets_of_environment():
        text = text.replace(secret, MASK)
    return text


def with_masked_parameters(text: str) -> str:
    """Return a text without what stands behind the parameters of addresses that are credentials by their names."""
    parts, place = [], 0
    for parameter in PARAMETER.finditer(text):
        if parameter.start() >= place and is_secret(parameter[1]):
            value = VALUE.match(text, parameter.end())
            if value:
                parts += [text[place : value.start()], MASK]
                place = value.end()
    return "".join(parts) + text[place:]


def decoded_if_secret(word: str) -> str:
    """Return a word without its percent signs and credentials, or as it is if it has none of the latter."""
    decoded = word
    for _ in range(MOST_ENCODINGS):
        decoded = unquote(decoded)
        without = masked_as_written(decoded)
        if without != decoded:
            return without
    return word


def is_secret(name: str) -> bool:
    """Return whether a parameter of an address is a credential by its name, in whatever style that is written."""
    words = [word.lower() for word in WORDS.findall(name)]
    whole = "".join(words)
    return bool(SECRET_END.search(whole)) or whole in SECRET_NAMES or (words[-1:] or [""])[0] in SECRET_WORDS


def refuse_credentials(settings: Mapping[str, Any]) -> None:
    """Raise `ConfigError` naming a setting that holds a credential: settings go to the run folder and to trackers."""
    for key, text in texts_in_settings(settings, ""):
        name = "_".join(WORDS.findall(key.rpartition(".")[2])).lower()
        if masked(text) != text or (text and SECRET_OPTION.fullmatch(name)):
            raise ConfigError(
                f"{masked(key)}: it holds a credential, and settings are stored in the run folder and shown by "
                "trackers: leave it out and set the variable that the library reads, such as HF_TOKEN, WANDB_API_KEY "
                "or AWS_SECRET_ACCESS_KEY, or download the data and name its path"
            )


def texts_in_settings(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Yield the texts in nested settings, keys of dictionaries included, each with the dotted key it stands under."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield key or "settings", str(name)
            yield from texts_in_settings(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, Sequence):
        for inner in value:
            yield from texts_in_settings(inner, key)


def secrets_of_environment() -> list[str]:
    """Return the values of the variables whose names say that they are secret, the longest first."""
    named = (value for name, value in os.environ.items() if SECRET_VARIABLE.search(name))
    secrets = (value for value in named if len(value) >= SHORTEST_SECRET and not os.path.exists(value))
    return sorted(secrets, key=len, reverse=True)


def printable(text: str) -> str:
    """Return a text whose control characters are written out, since some make a terminal show what is not so."""
    return CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
