"""Pairs in tar shards at addresses, read from front to back while they are trained on.

Members that follow each other with one key make a sample; a key that comes back later begins another. Members that no
setting and no usual ending asks for are passed over, and one picture at a time is held.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import groupby
from operator import itemgetter
from typing import Any

from accel_clip.console import say
from accel_clip.data.bad_samples import WITHOUT_PICTURE, UnusableSample
from accel_clip.data.captions import LARGEST_CAPTION_BYTES
from accel_clip.data.pictures.decode import looks_like
from accel_clip.data.sources.base import Pair, SourceOptions, StreamItem
from accel_clip.data.sources.connections import Patience
from accel_clip.data.sources.remote_file import RemoteFile
from accel_clip.data.sources.shards.member_names import key_and_ending, stem_and_ending, words_named, words_of_endings
from accel_clip.data.sources.shards.tar_headers import BLOCK_BYTES, Archive, ForwardFile, Member, padded
from accel_clip.data.sources.shards.tar_index import COMPRESSED
from accel_clip.data.sources.shards.texts import (
    LARGEST_PICTURE_BYTES,
    PICTURE_EXTENSIONS,
    RECORD,
    USUAL_TEXTS,
    SampleTexts,
    TextRule,
    endings_named,
    picture_extensions,
    picture_too_large,
    require_texts,
    text_encodings,
    text_rules,
    text_too_large,
    unread_in_words,
)
from accel_clip.data.sources.text_files import require_text_encoding
from accel_clip.faults import DataError
from accel_clip.redaction import masked

END = 1 << 62
"""the place behind everything in a shard: no member begins there"""
NUM_SHARDS_TO_TRY = 3
NUM_NAMES_TO_LOOK_AT = 20
BYTES_TO_LOOK_AT = 1 << 26
MOST_MEMBERS_FOR_A_SAMPLE = 100_000
MOST_BYTES_FOR_A_SAMPLE = 1 << 34
MOST_BYTES_AT_START = 1 << 28  # before the first member of a sample
PATIENCE_AT_START = Patience(waits_seconds=(1.0, 2.0), tell=say)


@dataclass
class PartialSample:
    """What has been read of a sample: bytes, or why there are none."""

    key: str
    """of the sample in its shard"""
    picture: bytes | UnusableSample | None = None
    """None before it has come"""
    rank: int = 0
    """of the picture's extension among those of pictures"""
    texts: dict[str, bytes | UnusableSample] = field(default_factory=dict)
    """by extension"""
    end: int = 0
    """where the last of its members ends"""

    def text(self, extension: str) -> bytes | None:
        """Return the bytes of a text member, None without one; raises `UnusableSample`."""
        return required_content(self.texts.get(extension))


class SearchLimit:
    """How far a shard is gone through in search of one sample, since one may go on without any, and without end.

    problem: why it was left, None as long as it was not.
    """

    def __init__(self, address: str, most_bytes: int = MOST_BYTES_FOR_A_SAMPLE) -> None:
        self.address, self.most_bytes = address, most_bytes
        self.problem: UnusableSample | None = None
        self.begin()

    def begin(self) -> None:
        """Begin anew, since a sample has come."""
        self.num_members, self.num_bytes = 0, 0

    def counted(self, members: Iterable[Member]) -> Iterator[Member]:
        """Yield members, until there are too many, or too many bytes, since the beginning."""
        for member in members:
            if self.num_members >= MOST_MEMBERS_FOR_A_SAMPLE or self.num_bytes >= self.most_bytes:
                found = f"{self.num_members:,} members of {self.num_bytes:,} bytes in a row"
                self.problem = UnusableSample("unreadable", f"{found} end no sample", self.address)
                return
            yield member
            self.num_members += 1
            self.num_bytes += BLOCK_BYTES + padded(member.num_bytes)


class RemoteShards:
    """A stream of the pairs in tar shards at `addresses`.

    pictures: the extensions of pictures, the preferred first; what captions, or labels, need is read beside them.
    words: those that belong to endings (see `member_names`).
    """

    def __init__(
        self,
        name: str,
        addresses: Sequence[str],
        pictures: tuple[str, ...],
        captions: TextRule | None,
        labels: TextRule | None,
        encodings: tuple[str, ...],
        words: frozenset[bytes],
        patience: Patience | None = None,
    ) -> None:
        self.name, self.addresses, self.num_shards = name, list(addresses), len(addresses)
        self.pictures, self.caption_rule, self.label_rule, self.words = pictures, captions, labels, words
        self.encodings, self.patience = encodings, patience or Patience()
        rules = [rule for rule in (captions, labels) if rule]
        self.text_extensions = {RECORD, *(word for rule in rules for word in rule.named or rule.usual_extensions)}

    def read(self, shard: int, start: int) -> Iterator[StreamItem]:
        """Yield what a shard holds from byte `start` on, 0 or the `end` of what it gave before.

        A shard that cannot be read, or on, ends with an `UnusableSample` that says why.
        """
        if start >= END:
            return
        address, last = masked(self.addresses[shard]), None
        with RemoteFile(self.addresses[shard], start, self.patience) as file:
            archive = Archive(file)
            try:
                for sample in self.samples(archive, address):
                    if last is not None:
                        yield last
                    last = StreamItem(sample.key, self.outcome(sample), sample.end)
                problem = problem_of(archive, address)
            except UnusableSample as failure:
                problem = UnusableSample(*failure.args)
        if last is not None and problem is not None and is_of_cut_shard(last.pair):
            last, problem = replace(last, end=END), None  # what is wrong with the shard is said by this sample
        if last is not None:
            yield last
        if problem is not None:
            yield StreamItem(address, problem, END)

    def samples(self, archive: Archive, address: str) -> Iterator[PartialSample]:
        """Yield the samples of an archive that have a picture or a text; raises `UnusableSample` where it breaks."""
        limit = SearchLimit(address)
        named = ((stem_and_ending(member.name), member) for member in limit.counted(archive.members()))
        keyed = ((*key_and_ending(*names, self.words), member) for names, member in named if names)
        wanted = (each for each in keyed if self.is_wanted(each[1]))
        for key, members in groupby(wanted, key=itemgetter(0)):
            sample = PartialSample(f"{address}/{key.decode(errors='backslashreplace')}")
            for _, extension, member in members:
                self.take(sample, extension, member, archive.file)
            yield sample
            limit.begin()
        if limit.problem:
            raise limit.problem

    def is_wanted(self, extension: str) -> bool:
        """Return whether members with that extension are pictures or texts."""
        return extension in self.pictures or extension in self.text_extensions

    def take(self, sample: PartialSample, extension: str, member: Member, file: ForwardFile) -> None:
        """Read a member that is the sample's picture or one of its texts; of two with one name the later counts."""
        sample.end = padded(member.offset + member.num_bytes)
        if extension in self.text_extensions:
            is_too_large = member.num_bytes > LARGEST_CAPTION_BYTES
            path = f"{sample.key}.{extension}"
            content = text_too_large(member.num_bytes, path) if is_too_large else content_or_problem(member, file, path)
            sample.texts[extension] = content
            return
        rank = self.pictures.index(extension)
        if sample.picture is None or rank <= sample.rank:
            sample.picture, sample.rank = None, rank  # the one before is let go of first
            is_too_large = member.num_bytes > LARGEST_PICTURE_BYTES
            path = sample.key
            content = (
                picture_too_large(member.num_bytes, path) if is_too_large else content_or_problem(member, file, path)
            )
            sample.picture = content

    def outcome(self, sample: PartialSample) -> Pair | UnusableSample:
        """Return a sample as a pair, or why it is none."""
        texts = SampleTexts(sample.texts, sample.text, sample.key, self.encodings)
        try:
            captions, weights = texts.captions(self.caption_rule) if self.caption_rule else ((), ())
            label = texts.label(self.label_rule) if self.label_rule else None
            picture = required_content(sample.picture)
            if picture is None:
                raise UnusableSample("missing_file", WITHOUT_PICTURE, sample.key)
        except UnusableSample as problem:
            return UnusableSample(*problem.args)  # a new one: what was raised keeps all that was at hand in memory
        return Pair(picture, captions, label, weights=weights)


def content_or_problem(member: Member, file: ForwardFile, path: str) -> bytes | UnusableSample:
    """Return the bytes of the member that comes next in a file, or the error for a file that ends before they do."""
    content = file.read(member.num_bytes)
    if len(content) < member.num_bytes:
        return UnusableSample("truncated_shard", "the shard ends before the data does", path)
    return content


def required_content(content: bytes | UnusableSample | None) -> bytes | None:
    """Return the bytes of a member, None without one; raises `UnusableSample` where they are wrong."""
    if isinstance(content, UnusableSample):
        raise content
    return content


def is_of_cut_shard(outcome: Pair | UnusableSample) -> bool:
    """Return whether a sample is the one that a shard ends inside of."""
    return isinstance(outcome, UnusableSample) and outcome.reason == "truncated_shard"


def problem_of(archive: Archive, address: str) -> UnusableSample | None:
    """Return what is wrong with an archive that was gone through."""
    if archive.problem is None:
        return None
    if archive.head.startswith(COMPRESSED):
        return UnusableSample("unreadable", "the shard is compressed: unpack it to a plain .tar", address)
    kind = looks_like(archive.head) if archive.head else ""
    if kind or archive.problem.endswith(" at byte 0"):
        return UnusableSample("unreadable", f"not a tar archive{kind or f' ({archive.problem})'}", address)
    return UnusableSample("truncated_shard", archive.problem, address)


def open_remote_shards(
    written: str,
    addresses: Sequence[str],
    options: SourceOptions,
    patience: Patience | None = None,
    patience_at_start: Patience = PATIENCE_AT_START,
) -> RemoteShards:
    """Return a stream of the pairs in tar shards at addresses, after a look at the beginning of the first one there is.

    written: what the user calls them. Raises `DataError` when none can be read, `ConfigError` for members that are not
    there.
    """
    require_text_encoding(options.encoding)
    name = masked(written)
    encodings = text_encodings(options.encoding)
    captions, labels = text_rules(options)
    rule = captions or labels
    assert rule is not None
    beginning = first_beginning(addresses, name, encodings, patience_at_start)
    words = words_named(endings_named(rule, options.image_key)) | beginning.words()
    counts, records = beginning.counts(words), beginning.records(words)
    present = [ending for ending in counts if ending]
    pictures = picture_extensions(present, options.image_key, f"the beginning of {name}")
    require_texts(f"the beginning of {name}", rule, present, present, records)
    unread = {
        each: number for each, number in counts.items() if each not in {*pictures, *rule.extensions(present), RECORD}
    }
    if unread:
        say(f"{name}: among the first {counts.total():,} members these are not read: {unread_in_words(unread)}")
    return RemoteShards(name, addresses, pictures, captions, labels, encodings, words, patience)


@dataclass
class ArchiveBeginning:
    """The first members of an archive."""

    names: list[tuple[bytes, str]] = field(default_factory=list)
    """in two parts: what stands before the last dot, and the ending"""
    objects: list[tuple[bytes, dict[str, Any]]] = field(default_factory=list)
    """what is in those that end with .json, with the first part of their name"""

    def words(self) -> frozenset[bytes]:
        """Return the words that belong to endings by these names."""
        endings: dict[bytes, set[str]] = {}
        for stem, ending in self.names:
            endings.setdefault(stem, set()).add(ending)
        return words_of_endings(endings, PICTURE_EXTENSIONS, USUAL_TEXTS)

    def counts(self, words: frozenset[bytes]) -> Counter[str]:
        """Return how many members have each ending."""
        return Counter(key_and_ending(stem, ending, words)[1] for stem, ending in self.names)

    def records(self, words: frozenset[bytes]) -> list[dict[str, Any]]:
        """Return the objects in .json members, not those in `.syn.json` and the like."""
        return [found for stem, found in self.objects if key_and_ending(stem, RECORD, words)[1] == RECORD]


def first_beginning(
    addresses: Sequence[str], name: str, encodings: tuple[str, ...], patience: Patience
) -> ArchiveBeginning:
    """Return what stands at the beginning of the first shard that can be read; raises `DataError`."""
    failures = []
    for address in addresses[:NUM_SHARDS_TO_TRY]:
        say(f"looking at the beginning of {address}")
        with RemoteFile(address, patience=patience) as file:
            archive = Archive(file)
            try:
                beginning = first_members(archive, SearchLimit(masked(address), MOST_BYTES_AT_START), encodings)
                problem = problem_of(archive, masked(address))
            except UnusableSample as failure:
                beginning, problem = ArchiveBeginning(), failure
            if any(ending for _, ending in beginning.names) or problem is None:
                return beginning
            failures.append(f"{problem.path}: {problem.detail}")
            if not file.was_answered:
                break
    tried = "it was" if len(failures) == 1 else f"its first {len(failures)} shards were"
    raise DataError(f"{name} cannot be read, {tried} tried: {'; '.join(failures)}")


def first_members(archive: Archive, limit: SearchLimit, encodings: tuple[str, ...]) -> ArchiveBeginning:
    """Return the names of an archive's first members and the objects in those that end with .json.

    Raises `UnusableSample` where the limit is reached before there is any.
    """
    beginning, stems = ArchiveBeginning(), set[bytes]()
    for member in limit.counted(archive.members()):
        names = stem_and_ending(member.name)
        if names is None:
            continue
        if names[1]:
            limit.begin()
            stems.add(names[0])
        if len(stems) > NUM_NAMES_TO_LOOK_AT:
            break
        beginning.names.append(names)
        if archive.file.tell() + member.num_bytes > BYTES_TO_LOOK_AT:
            break
        if names[1] == RECORD and member.num_bytes <= LARGEST_CAPTION_BYTES:
            content = archive.file.read(member.num_bytes)
            with suppress(UnusableSample):
                beginning.objects.append(
                    (names[0], SampleTexts([RECORD], {RECORD: content}.get, "", encodings).record())
                )
    if limit.problem and not stems:
        raise limit.problem
    return beginning
