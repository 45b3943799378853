"""Streams: what a source on the disk gives, from a server that fails in every way, taken up again at every place."""

from __future__ import annotations

import gzip
import io
import pickle
import random
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, Value
from pyarrow import parquet

from accel_clip.config import DataConfig
from accel_clip.data.bad_samples import UnusableSample
from accel_clip.data.captions import choose_caption, weighted
from accel_clip.data.pairs import open_training
from accel_clip.data.pictures.decode import decode_picture
from accel_clip.data.sources import hub_stream
from accel_clip.data.sources.base import Pair, Source, SourceOptions, Stream, StreamItem
from accel_clip.data.sources.hub import open_hub, open_saved
from accel_clip.data.sources.hub_stream import HubStream, stream_of
from accel_clip.data.sources.remote_file import Patience, RemoteFile, seconds_of
from accel_clip.data.sources.resolve import open_item, open_source
from accel_clip.data.sources.shards import local as shards
from accel_clip.data.sources.shards import remote as remote_shards
from accel_clip.data.sources.shards.names import find_addresses
from accel_clip.data.sources.shards.remote import RemoteShards, open_remote_shards
from accel_clip.faults import ConfigError, DataError
from helpers import nasty
from helpers.pictures import encoded, noise
from helpers.shards import FORMATS, numbered, one_sample, write_random, write_tar
from helpers.web import NEVER, Behaviour, served

AT_ONCE = Patience(waits_seconds=(0.0,) * 4)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def opened(address: str, patience: Patience = AT_ONCE, **settings: Any) -> RemoteShards:
    return open_remote_shards(address, find_addresses(address), SourceOptions(address, **settings), patience, AT_ONCE)


def on_disk(item: Path | str, **settings: Any) -> Source:
    return open_source(str(item), DataConfig(**settings))


Outcome = tuple[Any, ...]


def outcome(given: Pair | UnusableSample) -> Outcome:
    """Return what can be compared of a pair or of what is wrong with one."""
    if isinstance(given, UnusableSample):
        return given.reason, given.detail, given.path
    extra = {name: list(map(float, numbers)) for name, numbers in given.extra.items()}
    return given.image, given.captions, given.label, extra, given.weights


def outcomes(items: Sequence[StreamItem]) -> list[Outcome]:
    return [(item.key, item.end, *outcome(item.pair)) for item in items]


def outcomes_on_disk(source: Source) -> list[Outcome]:
    return [outcome(fetched(source, index)) for index in range(len(source))]


def fetched(source: Source, index: int) -> Pair | UnusableSample:
    try:
        return source[index]
    except UnusableSample as problem:
        return problem


def read(stream: Stream, shard: int = 0, start: int = 0) -> list[StreamItem]:
    """Return what a shard holds; none of it may keep what was at hand when it turned out to be unusable."""
    items = list(stream.read(shard, start))
    problems = [item.pair for item in items if isinstance(item.pair, UnusableSample)]
    assert all(problem.__traceback__ is None and problem.__context__ is None for problem in problems)
    return items


def problem_of(item: StreamItem) -> UnusableSample:
    assert isinstance(item.pair, UnusableSample), item
    return item.pair


def require_exact_places(stream: Stream) -> None:
    """Fail unless every shard is read on from every place as it is when it is read at one go."""
    for shard in range(stream.num_shards):
        whole = outcomes(read(stream, shard))
        ends = [item[1] for item in whole]
        assert ends == sorted(set(ends)) and all(end > 0 for end in ends)
        for number, end in enumerate(ends):
            assert outcomes(read(stream, shard, end)) == whole[number + 1 :], (shard, end)


def reason_in_training(given: Pair | UnusableSample) -> str:
    try:
        if isinstance(given, UnusableSample):
            raise given
        choose_caption(given.captions, 0, 0, 0)
        decode_picture(given.image, 50e6)
    except UnusableSample as problem:
        return problem.reason
    return nasty.FINE


# --- tar shards: what a disk gives


class InOrder(random.Random):
    """Leaves members of one sample beside each other."""

    def shuffle(self, words: Any) -> None:
        pass


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("seed", range(2))
def test_random_sets_are_what_the_disk_gives_from_every_place(seed, kind, tmp_path):
    draw = InOrder(f"{seed} {kind}")
    for number in range(2):
        write_random(tmp_path / f"{number}.tar", draw, kind)
    source = on_disk(tmp_path / "{0,1}.tar")
    with served(tmp_path) as address:
        stream = opened(address + "/{0,1}.tar")
        items = [item for shard in (0, 1) for item in read(stream, shard)]
        require_exact_places(stream)
    found = [(item.key, reason_or_pair(item.pair)) for item in items]
    assert found == [(f"{address}/{source.key(n)}", reason_or_pair(fetched(source, n))) for n in range(len(source))]
    assert sum(isinstance(item.pair, Pair) for item in items) > 5


def reason_or_pair(given: Pair | UnusableSample) -> object:
    return given.reason if isinstance(given, UnusableSample) else outcome(given)


def test_nasty_samples_count_as_they_do_on_a_disk(tmp_path):
    samples = nasty.held_by("shard", 40)
    source = on_disk(nasty.write("shard", samples, tmp_path))
    with served(tmp_path / "bag") as address:
        stream = opened(address + "/0000.tar")
        items = read(stream)
        require_exact_places(stream)
    expected = Counter(reason_in_training(fetched(source, index)) for index in range(len(source)))
    assert Counter(reason_in_training(item.pair) for item in items) == expected
    assert expected["truncated_shard"] == 1 and expected == {
        **Counter(sample.outcome for sample in samples),
        "truncated_shard": 1,
    }


@pytest.mark.parametrize(
    "members, settings",
    [
        ({"jpg": b"j", "txt": "\ufeff青蛙".encode()}, {}),
        ({"jpg": b"j", "txt": "青蛙".encode("gb18030")}, {"encoding": "gb18030"}),
        ({"jpg": b"j", "txt": "青蛙".encode("gb18030")}, {}),
        ({"jpg": b"j", "txt": b"x" * 65537}, {}),
        ({"jpg": b"j", "txt": b" \n"}, {}),
        ({"jpg": b"j", "txt": b"text", "json": b'{"caption": "json"}'}, {}),
        ({"jpg": b"j", "json": b'{"captions": ["a", " ", "b", null, {"c": 1}]}'}, {}),
        ({"jpg": b"j", "txt": b"t", "json": b'{"alt": "a", "zh": "z"}'}, {"caption_key": ["zh", "alt", "txt"]}),
        ({"jpg": b"j", "json": b'{"caption": '}, {}),
        ({"jpg": b"j", "JSON": b"[" * 60000}, {}),
        ({"jpg": b"j", "json": b'{"caption": "' + b"x" * 65536 + b'"}'}, {}),
        ({"WEBP": b"w", "seg.png": b"s", "png": b"p", "Jpg": b"j", "txt": b"x"}, {}),
        ({"WEBP": b"w", "seg.png": b"s", "png": b"p", "Jpg": b"j", "txt": b"x"}, {"image_key": ".seg.png"}),
        ({"npy": b"1", "jpg": b"j", "txt": b"x"}, {"image_key": "jpg"}),
    ],
)
def test_a_sample_is_what_it_is_on_a_disk(members, settings, tmp_path):
    path = one_sample(tmp_path, members)
    given = outcome(fetched(on_disk(path, **settings), 0))
    captions = dict.fromkeys(settings.pop("caption_key", ()), 1.0)
    with served(tmp_path) as address:
        (item,) = read(opened(address + "/x.tar", captions=captions, **settings))
    if isinstance(item.pair, UnusableSample):
        assert item.pair.path.removeprefix(address) == given[2].removeprefix(str(tmp_path))
        assert outcome(item.pair)[:2] == given[:2]
    else:
        assert outcome(item.pair) == given


def test_labels(tmp_path):
    one_sample(tmp_path, {"jpg": b"", "cls": b"frog\n", "txt": b"a frog"})
    with served(tmp_path) as address:
        (item,) = read(opened(address + "/x.tar", needs="labels"))
    assert item.pair.label == "frog" and item.pair.captions == ()


def test_captions_are_weighted_by_where_they_come_from_as_on_a_disk(tmp_path):
    record = b'{"alt": ["a", "b", " "], "long": "l"}'
    path = one_sample(tmp_path, {"jpg": b"", "txt": b"t", "json": record})
    weights = {"txt": 3.0, "alt": 1.0, "none": 2.0, "long": 1.0}
    write_tar(tmp_path / "y.tar", {"1.jpg": b"", "1.json": b'{"none": "", "alt": ""}', "1.txt": b"t"})
    with served(tmp_path) as address:
        stream = opened(address + "/{y,x}.tar", captions={"txt": 3.0, "alt": 1.0})
        assert [item.pair.weights for item in read(stream, 0)] == [(3.0,)]
        (item,) = read(stream, 1)
        assert (item.pair.captions, item.pair.weights) == (("t", "a", "b"), (3.0, 0.5, 0.5))
        (item,) = read(opened(address + "/x.tar", captions={"txt": 2.0, "alt": 2.0}))
        assert (item.pair.captions, item.pair.weights) == (("t", "a", "b"), ())
    options = SourceOptions(str(path), captions={"txt": 3.0, "alt": 1.0})
    assert shards.open_shards(str(path), [path], options)[0].weights == (3.0, 0.5, 0.5)
    texts = {"txt": ["t"], "alt": ["a", "b", " "], "none": [], "long": ["l"]}
    assert weighted(texts, weights) == (("t", "a", "b", "l"), (3.0, 0.5, 0.5, 1.0))


def test_a_key_that_comes_back_begins_another_sample(tmp_path):
    members = [("1.jpg", b"a"), ("1.txt", b"a"), ("2.jpg", b"b"), ("README", b""), ("2.txt", b"b"), ("1.txt", b"c")]
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    with served(tmp_path) as address:
        stream = opened(address + "/x.tar")
        found = [reason_or_pair(item.pair) for item in read(stream)]
        require_exact_places(stream)
    assert found == [(b"a", ("a",), None, {}, ()), (b"b", ("b",), None, {}, ()), "missing_file"]


def test_what_is_not_needed_or_too_large_is_passed_over_piece_by_piece(tmp_path, monkeypatch):
    for module in (shards, remote_shards):
        monkeypatch.setattr(module, "LARGEST_PICTURE_BYTES", 1000)
    members = {"0.pth": bytes(1 << 22), "0.jpg": b"j", "0.txt": b"0", "1.jpg": bytes(1 << 22), "1.txt": b"1"}
    members |= {"2.jpg": b"j", "2.png": bytes(1 << 22), "2.txt": b"2"}
    source = on_disk(write_tar(tmp_path / "x.tar", members), image_key="jpg")
    largest = []
    read_bytes = RemoteFile.read
    monkeypatch.setattr(RemoteFile, "read", lambda file, size: (largest.append(size), read_bytes(file, size))[1])
    with served(tmp_path) as address:
        found = [reason_or_pair(item.pair) for item in read(opened(address + "/x.tar"))]
    assert found == [reason_or_pair(fetched(source, index)) for index in range(3)]
    assert found[1] == "too_large" and max(largest) < 1000


def test_a_stream_goes_to_another_process_and_reads_the_same_there(tmp_path):
    write_tar(tmp_path / "0.tar", numbered(0))
    with served(tmp_path) as address:
        stream = opened(address + "/0.tar")
        assert isinstance(stream, Stream) and stream.num_shards == 1
        assert outcomes(read(pickle.loads(pickle.dumps(stream)))) == outcomes(read(stream))


# --- tar shards: what a server does


@pytest.fixture
def shard(tmp_path) -> Path:
    return write_tar(tmp_path / "web" / "0.tar", numbered(0, 8))


def whole(shard: Path) -> list[Outcome]:
    with served(shard.parent) as address:
        return [item[2:] for item in outcomes(read(opened(address + "/0.tar")))]


@pytest.mark.parametrize("knows_ranges", [True, False])
@pytest.mark.parametrize("drop_after", [0, 1, 511, 512, 513, 3000])
def test_broken_connections_are_made_anew(drop_after, knows_ranges, shard):
    behaviour = Behaviour(knows_ranges=knows_ranges)
    with served(shard.parent, behaviour) as address:
        stream = opened(address + "/0.tar")
        behaviour.told.clear()
        behaviour.drop_after, behaviour.num_drops = drop_after, 4
        items = read(stream)
    assert [item[2:] for item in outcomes(items)] == whole(shard)
    places = [int(wanted.removeprefix("bytes=")[:-1]) if wanted else 0 for _, wanted in behaviour.told]
    step = drop_after if knows_ranges else 0
    assert places == [drop_after if number and not step else number * step for number in range(5)]
    assert all(asked.get("Accept-Encoding") == "identity" for asked in behaviour.asked)


def test_a_body_that_ends_early_without_a_length_is_a_shard_that_is_cut(shard):
    behaviour = Behaviour(says_length=False)
    with served(shard.parent, behaviour) as address:
        stream = opened(address + "/0.tar")
        behaviour.drop_after, behaviour.num_drops = 6000, NEVER
        items = read(stream)
    assert [item[2:] for item in outcomes(items)][:2] == whole(shard)[:2]
    assert len(items) == 3 and problem_of(items[-1]).reason == "truncated_shard"


@pytest.mark.parametrize("status", [403, 404, 410, 401, 400, 304])
def test_what_is_refused_is_asked_for_once_and_said_without_credentials(status, shard):
    behaviour = Behaviour()
    with served(shard.parent, behaviour) as address:
        stream = opened(address + "/0.tar")
        stream.addresses = [f"{address}/0.tar?X-Amz-Signature=CANARY0123"]
        behaviour.told.clear()
        behaviour.statuses[:] = [status]
        (item,) = read(stream)
    problem = problem_of(item)
    assert problem.reason == "missing_file" and str(status) in problem.detail and len(behaviour.told) == 1
    assert problem.path == item.key == f"{address}/0.tar?X-Amz-Signature=***"
    assert read(stream, 0, item.end) == []


def test_a_server_that_asks_for_patience_gets_it(shard):
    waits: list[float] = []
    behaviour = Behaviour(headers={"Retry-After": "7"})
    with served(shard.parent, behaviour) as address:
        patience = Patience(waits_seconds=(1.0, 2.0, 30.0, 40.0), longest_wait_seconds=50.0, sleep=waits.append)
        stream = opened(address + "/0.tar", patience)
        behaviour.statuses[:] = [503, 429, 500]
        assert [item[2:] for item in outcomes(read(stream))] == whole(shard)
        assert waits == [7.0, 7.0, 30.0]
        behaviour.statuses[:], behaviour.headers = [503], {"Retry-After": "100000"}
        read(stream)
    assert waits[3:] == [50.0]


@pytest.mark.parametrize(
    "words, seconds", [("", 0), ("12", 12), ("soon", 0), ("Wed, 21 Oct 2015 07:28:00 GMT", 0), ("-3", 0)]
)
def test_words_for_when_to_come_back(words, seconds):
    assert seconds_of(words) == seconds


def test_a_shard_that_breaks_for_good_gives_what_came_before_and_then_says_why(shard):
    waits: list[float] = []
    behaviour = Behaviour()
    with served(shard.parent, behaviour) as address:
        stream = opened(address + "/0.tar", Patience(waits_seconds=(1.0, 2.0, 3.0, 4.0), sleep=waits.append))
        behaviour.told.clear()
        behaviour.drop_after, behaviour.num_drops = 6000, 1
        behaviour.statuses[:] = [200] + [502] * 9
        items = read(stream)
    problem = problem_of(items[-1])
    assert [item[2:] for item in outcomes(items[:-1])] == whole(shard)[: len(items) - 1] and len(items) == 3
    assert problem.reason == "missing_file" and problem.path == f"{address}/0.tar"
    assert "5 attempts have failed, the last by the answer 502" in problem.detail
    assert waits == [1.0, 2.0, 3.0, 4.0] and len(behaviour.told) == 5
    assert read(stream, 0, items[-1].end) == []


@pytest.mark.parametrize("drop_after", [100_000, 1_200_000])
def test_attempts_count_anew_after_much_was_read(drop_after, tmp_path):
    """A server gives up on one that reads slowly, as a training does: what it had sent until then is a few buffers."""
    members = {f"{n}.{end}": bytes(drop_after) if end == "jpg" else b"x" for n in range(8) for end in ("jpg", "txt")}
    write_tar(tmp_path / "0.tar", members)
    behaviour = Behaviour()
    with served(tmp_path, behaviour) as address:
        stream = opened(address + "/0.tar")
        behaviour.drop_after = drop_after
        assert sum(isinstance(item.pair, Pair) for item in read(stream)) == 8


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_a_file_that_changes_meanwhile_is_noticed(knows_ranges, shard):
    behaviour = Behaviour(knows_ranges=knows_ranges)

    def change(seconds: float) -> None:
        behaviour.entity_tag = '"two"'

    with served(shard.parent, behaviour) as address:
        stream = opened(address + "/0.tar", Patience(waits_seconds=(0.0,), sleep=change))
        behaviour.drop_after, behaviour.num_drops = 6000, 1
        items = read(stream)
    assert len(items) == 3 and "changed" in problem_of(items[-1]).detail
    assert problem_of(items[-1]).reason == "truncated_shard"
    assert behaviour.asked[-1]["If-Range"] == '"one"'


def test_a_server_that_goes_away_costs_its_shards_alone(shard):
    with served(shard.parent) as address:
        stream = opened(address + "/0.tar")
    (item,) = read(stream)
    assert problem_of(item).reason == "missing_file" and "ConnectError" in problem_of(item).detail


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/x.tar", "http://[", "gopher:x"])
def test_redirects_lead_nowhere_but_to_http(target, shard):
    behaviour = Behaviour()
    with served(shard.parent, behaviour) as address:
        stream = opened(address + "/0.tar")
        behaviour.told.clear()
        behaviour.statuses[:], behaviour.headers = [302] * 9, {"Location": target}
        (item,) = read(stream)
    assert problem_of(item).reason == "missing_file"


def test_redirects_are_followed(shard, tmp_path):
    behaviour = Behaviour(drop_after=3000, num_drops=1)
    with served(shard.parent, behaviour) as address:
        first = Behaviour(statuses=[307] * 9, headers={"Location": f"{address}/0.tar"})
        with served(tmp_path, first) as other:
            stream = opened(other + "/0.tar")
            assert [item[2:] for item in outcomes(read(stream))] == whole(shard)
    endless = Behaviour(statuses=[302] * 99, headers={"Location": "/0.tar"})
    with served(shard.parent, endless) as address, pytest.raises(DataError, match="leads nowhere"):
        opened(address + "/0.tar")


# --- tar shards: what is no whole archive


def test_every_cut_is_noticed_once_and_never_gives_wrong_bytes(tmp_path, capsys):
    content = write_tar(tmp_path / "whole.tar", numbered(0, 3) | {"002.pth": bytes(700)}).read_bytes()
    path = tmp_path / "web" / "x.tar"
    path.parent.mkdir()
    path.write_bytes(content)
    end = content.rindex(b"\0" * 1024)
    with served(path.parent) as address:
        stream = opened(address + "/x.tar")
        right = [reason_or_pair(item.pair) for item in read(stream)]
        for size in sorted({*range(2048, len(content), 370), *range(2048, len(content), 512), end + 511}):
            path.write_bytes(content[:size])
            path.with_name("x.tar.accel-clip-index").unlink(missing_ok=True)
            source = on_disk(path)
            said = "it ends" in capsys.readouterr().err
            items = read(stream)
            require_exact_places(stream)
            found = [reason_or_pair(item.pair) for item in items]
            expected = [reason_or_pair(fetched(source, index)) for index in range(len(source))]
            if said and "truncated_shard" not in expected:
                expected.append("truncated_shard")
            assert found == expected, size
            assert all(pair in right for pair in found if not isinstance(pair, str) and pair[1])


def test_what_is_no_archive_is_said_to_be_none(tmp_path):
    write_tar(tmp_path / "0.tar", numbered(0))
    (tmp_path / "1.tar").write_bytes(gzip.compress(random.Random(0).randbytes(5000)))
    (tmp_path / "2.tar").write_bytes(b"<!doctype html>" * 100)
    (tmp_path / "3.tar").write_bytes(b"<html>")
    (tmp_path / "4.tar").write_bytes(random.Random(0).randbytes(5000))
    (tmp_path / "5.tar").write_bytes(b"")
    with served(tmp_path) as address:
        stream = opened(address + "/{0..5}.tar")
        found = [problem_of(read(stream, number)[0]) for number in range(1, 6)]
        with pytest.raises(DataError, match=r"its first 3 shards were tried: .*/1\.tar.*compressed.*web page"):
            opened(address + "/{1..5}.tar")
    assert [problem.reason for problem in found] == ["unreadable"] * 4 + ["truncated_shard"]
    for problem, words in zip(found, ("compressed", "web page", "web page", "not a tar", "end-of-arch"), strict=True):
        assert words in problem.detail


def test_garbage_in_headers_ends_a_shard_and_never_the_program(tmp_path):
    content = write_tar(tmp_path / "whole.tar", numbered(0, 4), "pax").read_bytes()
    (tmp_path / "x.tar").write_bytes(content)
    draw = random.Random(0)
    with served(tmp_path) as address:
        stream = opened(address + "/x.tar")
        for _ in range(40):
            damaged = bytearray(content)
            for _ in range(draw.randint(1, 20)):
                damaged[draw.randrange(512, len(content))] = draw.randrange(256)
            (tmp_path / "x.tar").write_bytes(damaged)
            assert 1 <= len(read(stream)) <= 9


# --- tar shards: the look at the start


def test_names_that_no_member_has_stop_the_start(tmp_path):
    one_sample(tmp_path, {"jpg": b"", "json": b'{"alt_text": "x"}', "cap": b"x"})
    with served(tmp_path) as address:
        for settings, pattern in (
            ({"image_key": "jpgg"}, r"data\.image_key: .*/x\.tar has no members '\.jpgg', did you mean 'jpg'"),
            ({}, r"data\.caption_key: .* none of the usual \.txt, \.caption members .*keys in \.json: alt_text"),
            ({"captions": {"alt_txt": 1.0}}, r"data\.caption_key: .*'alt_txt', did you mean 'alt_text'\?"),
        ):
            with pytest.raises(ConfigError, match=pattern):
                opened(address + "/x.tar", **settings)
        assert read(opened(address + "/x.tar", captions={"cap": 1.0}))[0].pair.captions == ("x",)
        with pytest.raises(ConfigError, match=r"data\.encoding: 'klingon'"):
            opened(address + "/x.tar", encoding="klingon")


def test_columns_of_numbers_that_a_stream_does_not_bring_stop_the_start(shard):
    with served(shard.parent) as address:
        data = DataConfig(train=[address + "/0.tar"])
        assert open_training(data).streams
        with pytest.raises(ConfigError, match=r"loss\.options: the source .*0\.tar' has no column 'f'"):
            open_training(data, ("f",))


def test_a_server_that_is_not_there_stops_the_start(tmp_path):
    with served(tmp_path) as address, pytest.raises(DataError, match=r"/9\.tar cannot be read, it was tried: .*404"):
        opened(address + "/9.tar")
    with pytest.raises(DataError, match=rf"tried: {address}/0\.tar: 5 attempts have failed, the last by ConnectError"):
        opened(address + "/{0..9}.tar")


def test_only_a_little_is_read_at_the_start(tmp_path):
    members = {f"{n}.{end}": bytes(200_000) if end == "jpg" else b"x" for n in range(300) for end in ("jpg", "txt")}
    write_tar(tmp_path / "2.tar", members)
    behaviour = Behaviour(statuses=[404, 410])
    read_chunks = []
    with served(tmp_path, behaviour) as address:
        before, RemoteFile.next_chunk = RemoteFile.next_chunk, counting(RemoteFile.next_chunk, read_chunks)
        try:
            stream = open_item(address + "/{0..9}.tar", DataConfig())
        finally:
            RemoteFile.next_chunk = before
        assert isinstance(stream, RemoteShards) and stream.num_shards == 10
    assert [path for path, _ in behaviour.told] == ["/0.tar", "/1.tar", "/2.tar"]
    assert 20 * 200_000 < sum(read_chunks) < 22 * 200_000


def counting(method: Any, sizes: list[int]) -> Any:
    def counted(file: RemoteFile) -> bytes:
        chunk = method(file)
        sizes.append(len(chunk))
        return chunk

    return counted


# --- datasets


def rows(num_rows: int, first: int = 0, paths: tuple[str | None, ...] = ("../secret.png", "gone.png", None)) -> Dataset:
    """Return rows of which some cannot be used; some pictures are at `paths`."""
    numbers = range(first, first + num_rows)
    features = Features(
        {
            "image": Image(),
            "caption": ClassLabel(names=["frog", "owl"]),
            "alt": [Value("string")],
            "x": [Value("float32")],
        }
    )
    pictures = [{"bytes": encoded(noise(seed=n % 5)), "path": None} for n in numbers]
    for number in range(0, num_rows, 4):
        path = paths[number // 4 % len(paths)]
        pictures[number] = path and {"bytes": None, "path": path}
    columns = {
        "image": pictures,
        "caption": [None if n % 6 == 5 else n % 2 for n in numbers],
        "alt": [[f"alt {n}", " ", "more"][: n % 4] for n in numbers],
        "x": [[float(n), 1.0] if n % 7 else [1.0] for n in numbers],
    }
    return Dataset.from_dict(columns, features=features)


def write_parquet(dataset: Dataset, path: Path) -> None:
    """Write rows as they are: `datasets` itself would look for pictures that are not there."""
    path.parent.mkdir(exist_ok=True)
    parquet.write_table(dataset.data.table, path, row_group_size=3)


def compared(stream: Stream, source: Source) -> None:
    """Fail unless a stream gives the pairs and keys of a source in its order."""
    items = [item for shard in range(stream.num_shards) for item in read(stream, shard)]
    assert [outcome(item.pair) for item in items] == outcomes_on_disk(source)
    for index, item in enumerate(items):
        assert item.key == source.key(index) or (source.key(index) == "" and ", row " in item.key)
    assert {type(item.pair) for item in items} == {Pair, UnusableSample}


SETTINGS = [
    {},
    {"captions": {"alt": 1.0, "caption": 1.0}},
    {"captions": {"alt": 1.0, "caption": 2.0}, "extra": ("x",)},
    {"needs": "labels", "label_key": "caption"},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_folder_of_parquet_files_is_what_it_is_on_a_disk(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(hub_stream, "ROWS_AT_ONCE", 4)
    for number, num_rows in enumerate((7, 13, 1)):
        write_parquet(rows(num_rows, 20 * number + 1), tmp_path / f"{number}.parquet")
    options = SourceOptions("x", **settings)
    stream = hub_stream.open_hub_stream(str(tmp_path), options)
    assert stream.num_shards == 3 and stream.name == f"hf-stream:{tmp_path}"
    compared(stream, open_hub(str(tmp_path), options))
    require_exact_places(stream)


def save_splits(folder: Path) -> None:
    rows(21, 1, (None,)).with_format("torch").save_to_disk(folder / "train")
    rows(70, 1, (None,)).save_to_disk(folder / "test")
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_saved_dataset_is_what_it_is_on_a_disk(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(hub_stream, "MOST_SHARDS_OF_SAVED", 4)
    save_splits(tmp_path / "saved")
    options = SourceOptions("x", **settings)
    stream = hub_stream.open_hub_stream(str(tmp_path / "saved"), options)
    assert stream.num_shards == 4
    compared(stream, open_saved(tmp_path / "saved", options))
    require_exact_places(stream)


def test_a_saved_dataset_is_cut_into_shards_with_rows(tmp_path):
    save_splits(tmp_path / "saved")
    options = SourceOptions("x")
    for words, num_shards, num_rows in (("saved", 21, 21), ("saved/test", 64, 70), ("saved:test", 64, 70)):
        stream = hub_stream.open_hub_stream(str(tmp_path / words), options)
        sizes = [len(read(stream, shard)) for shard in range(stream.num_shards)]
        assert (len(sizes), sum(sizes)) == (num_shards, num_rows) and min(sizes) > 0


def test_rows_of_a_dataset_in_another_process(tmp_path):
    write_parquet(rows(5, 1), tmp_path / "0.parquet")
    stream = open_item(f"hf-stream:{tmp_path}", DataConfig())
    assert isinstance(stream, HubStream) and isinstance(stream, Stream)
    assert outcomes(read(pickle.loads(pickle.dumps(stream)))) == outcomes(read(stream))
    with pytest.raises(ConfigError, match=r"streams are for data\.train"):
        open_source(f"hf-stream:{tmp_path}", DataConfig())


def failing(shards: list[int], failures: list[Exception]) -> Iterator[dict[str, Any]]:
    for number in shards:
        for row in range(5):
            if number == 1 and row == 3 and failures:
                raise failures.pop(0)
            picture = encoded(noise(seed=row))
            yield {"image": {"bytes": picture, "path": None}, "caption": f"row {row} of shard {number}"}


FAILURES: list[Exception] = []


def failing_rows(shards: list[int]) -> Iterator[dict[str, Any]]:
    return failing(shards, FAILURES)


def test_rows_that_fail_for_a_moment_are_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr(hub_stream, "ROWS_AT_ONCE", 1)
    features = Features({"image": Image(), "caption": Value("string")})
    dataset = IterableDataset.from_generator(failing_rows, features=features, gen_kwargs={"shards": [0, 1]})
    stream = stream_of(dataset, "x", tmp_path, SourceOptions("x"))
    waits: list[float] = []
    stream.patience = Patience(waits_seconds=(1.0, 2.0), sleep=waits.append)
    right = outcomes(read(stream, 1))
    assert len(right) == 5
    FAILURES[:] = [ConnectionError("reset"), TimeoutError("slow")]
    assert outcomes(read(stream, 1)) == right and waits == [1.0, 2.0]
    for error, reason, num_waits in (
        (ConnectionError("reset"), "missing_file", 2),
        (FileNotFoundError("gone"), "missing_file", 0),
        (ValueError("broken"), "unreadable", 0),
    ):
        waits.clear()
        FAILURES[:] = [error] * 9
        items = read(stream, 1)
        assert outcomes(items[:3]) == right[:3] and len(items) == 4 and len(waits) == num_waits
        assert problem_of(items[3]).reason == reason and str(error) in problem_of(items[3]).detail
        assert items[3].key == "x, shard 1" and read(stream, 1, items[3].end) == []
    FAILURES.clear()


def test_datasets_that_cannot_be_streamed_stop_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    write_parquet(rows(3, 1), tmp_path / "good" / "0.parquet")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "0.parquet").write_bytes(b"no table")
    (tmp_path / "remote").mkdir()
    (tmp_path / "remote" / "0.jsonl").write_text('{"image": "https://example.org/1.jpg", "caption": "x"}\n')
    (tmp_path / "empty").mkdir()
    rows(0).save_to_disk(tmp_path / "saved")
    for words, pattern in (
        (f"{tmp_path}/good:nope", "Bad split: nope"),
        (f"{tmp_path}/bad", "cannot be (read|loaded)"),
        (f"{tmp_path}/remote", "holds addresses"),
        (f"{tmp_path}/empty", "cannot be loaded"),
        (f"{tmp_path}/saved", "the saved dataset cannot be loaded"),
        ("pandas", "reader of pickled tables"),
        ("org/none", "hf-stream:org/none:train cannot be loaded"),
        ("", "names no dataset"),
    ):
        with pytest.raises(DataError, match=pattern) as caught:
            open_item(f"hf-stream:{words}", DataConfig())
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"data\.caption_key: .* no column 'captoin', did you mean 'caption'"):
        open_item(f"hf-stream:{tmp_path}/good", DataConfig(caption_key=["captoin"]))
