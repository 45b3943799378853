"""What a server's answer says, read narrowly: it may send anything, and what makes no sense counts as not said."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime

import httpx2

from accel_clip.data.sources.shards.names import problem_of_host
from accel_clip.faults import one_line

MOST_DIGITS = 18  # of numbers that surely fit in 64 bits
LONGEST_WORDS = 256  # characters of a date, a tag or a range
NUMBER = re.compile(rf"[0-9]{{1,{MOST_DIGITS}}}")
CONTENT_RANGE = re.compile(rf"bytes ([0-9]{{1,{MOST_DIGITS}}})-[0-9]{{1,{MOST_DIGITS}}}/([0-9]{{1,{MOST_DIGITS}}}|\*)")
PLAIN = re.compile(rf"[ -~]{{1,{LONGEST_WORDS}}}")


class LeadsNowhere(Exception):
    """An address that no request can be sent to."""


@dataclass(frozen=True)
class Version:
    """By what a server tells one state of a file from another; what it does not say is None."""

    entity_tag: str | None
    """what the server calls this state"""
    changed: str | None
    """when the file was last changed, in the server's words"""
    num_bytes: int | None
    """size of the whole file"""

    def validator(self) -> str | None:
        """Return what a request for a part may be tied to: tags of the weak kind do not count."""
        tag = self.entity_tag
        return tag if tag is not None and not tag.startswith("W/") else self.changed

    def differs(self, other: Version) -> bool:
        """Return whether two answers are surely not of one state of the file."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return any(one != two for one, two in pairs if one is not None and two is not None)


def version_of(headers: httpx2.Headers) -> Version:
    """Return the state of the file that an answer is of."""
    match = CONTENT_RANGE.fullmatch(headers.get("Content-Range", ""))
    size = match[2] if match else headers.get("Content-Length", "")
    return Version(printable_words(headers.get("ETag")), printable_words(headers.get("Last-Modified")), number_in(size))


def start_of_range(headers: httpx2.Headers) -> int | None:
    """Return the place in the file at which the part begins that an answer brings, None where it does not say."""
    match = CONTENT_RANGE.fullmatch(headers.get("Content-Range", ""))
    return int(match[1]) if match else None


def number_in(text: str) -> int | None:
    """Return a number of bytes or seconds, None for anything else."""
    return int(text) if NUMBER.fullmatch(text) else None


def printable_words(text: str | None) -> str | None:
    """Return words that may be sent back to a server, None for others: they are printable, and not many."""
    return text if text is not None and PLAIN.fullmatch(text) else None


def seconds_of(retry_after: str) -> float:
    """Return for how long a server wants to be left alone: it writes seconds or a date."""
    number = number_in(retry_after.strip())
    if number is not None:
        return float(number)
    if printable_words(retry_after):
        with suppress(ValueError, TypeError, OverflowError, IndexError):
            date = parsedate_to_datetime(retry_after)
            return max((date - datetime.now(timezone.utc)).total_seconds(), 0.0)
    return 0.0


def address_in(written: str, before: httpx2.URL | None = None) -> httpx2.URL:
    """Return an address, one that a server redirects to from `before`; raises `LeadsNowhere`."""
    try:
        address = httpx2.URL(written) if before is None else before.join(written)
    except (httpx2.InvalidURL, ValueError) as error:
        raise LeadsNowhere(f"{quoted_words(written)} is no address ({one_line(error)})") from error
    if address.scheme not in ("http", "https"):
        raise LeadsNowhere(f"{quoted_words(written)} is neither http nor https")
    problem = problem_of_host(address.host, address.port)
    if problem:
        raise LeadsNowhere(f"{quoted_words(written)} {problem}")
    return address


def quoted_words(words: str) -> str:
    """Return what a server has written for a message, of which it fills no screen."""
    return repr(words if len(words) <= LONGEST_WORDS else words[:LONGEST_WORDS] + "…")
