"""Whether the Hugging Face Hub can be reached: found out once and soon, where its libraries try for minutes."""

from __future__ import annotations

import os
import socket
import sys
from functools import cache
from urllib.parse import urlsplit
from urllib.request import getproxies

from accel_clip.console import say

WAIT_SECONDS = 5.0


@cache
def go_offline_without_hub() -> None:
    """Let the libraries use what they have downloaded before, at once, when the hub cannot be reached.

    Behind a proxy, which alone knows what it reaches, they find out themselves.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or {"https", "http", "all"} & set(getproxies()):
        return
    address = urlsplit(constants.ENDPOINT)
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        socket.create_connection((address.hostname or "", port), WAIT_SECONDS).close()
    except OSError as error:
        say(f"{constants.ENDPOINT} cannot be reached ({error}): only what has been downloaded before can be used")
        os.environ["HF_HUB_OFFLINE"] = "1"
        constants.HF_HUB_OFFLINE = True
        if "datasets.config" in sys.modules:
            sys.modules["datasets.config"].HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
