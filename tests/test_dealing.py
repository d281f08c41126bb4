"""Every sample exactly once an epoch, and every process the same steps: however many images, processes, workers, shards."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from clipvisionalign.data.batches import count_chunks, local_batch_size, step_bounds, steps_in_epoch
from clipvisionalign.data.captioned import DataError
from clipvisionalign.data.streams.files import split_in_name
from clipvisionalign.data.streams.in_memory import read_stream_split
from clipvisionalign.data.streams.loader import StreamedBatches
from clipvisionalign.data.streams.sources import open_stream

#: Random dealings of each kind of stream; a worker takes a while to begin.
DEALINGS = int(os.environ.get("DEALINGS", "4"))

# --- the arithmetic --------------------------------------------------------------------------------------------------


@given(images=st.integers(2, 700), batch=st.integers(2, 130), processes=st.integers(1, 8), chunk=st.integers(1, 40))
@settings(max_examples=500, deadline=None)
def test_the_steps_of_an_epoch_hold_every_image_once(images, batch, processes, chunk):
    if images < processes or batch < processes:
        return
    steps = steps_in_epoch(images, batch, processes)
    bounds = [step_bounds(images, steps, step) for step in range(steps)]
    assert [index for first, last in bounds for index in range(first, last)] == list(range(images))
    sizes = [last - first for first, last in bounds]
    assert max(sizes) - min(sizes) <= 1
    # Not above what was asked for, but where a step of a single image, or a process without one, would be left.
    assert max(sizes) <= max(batch, 2 * max(2, processes) - 1)
    for step in range(steps):
        own = [local_batch_size(images, steps, step, (number, processes)) for number in range(processes)]
        assert sum(own) == sizes[step]
        assert min(own) >= 1
        count = count_chunks(images, steps, step, chunk, processes)
        # As many chunks on every process, none empty, about as large as was asked for.
        assert 1 <= count <= min(own)
        assert -(-max(own) // count) <= max(chunk, 2)


# --- streams ---------------------------------------------------------------------------------------------------------


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    about = tarfile.TarInfo(name)
    about.size = len(content)
    tar.addfile(about, io.BytesIO(content))


def write_tars(folder: Path, sizes: list[int]) -> str:
    """Shards of so many samples; the keys begin at 0 in every one of them."""
    number = 0
    for shard, size in enumerate(sizes):
        with tarfile.open(folder / f"train-{shard:03d}.tar", "w") as tar:
            for index in range(size):
                add(tar, f"{index:06d}.png", b"picture %d" % number)
                add(tar, f"{index:06d}.json", json.dumps({"caption": f"number {number}"}).encode())
                number += 1
    return str(folder)


def table(first: int, size: int) -> dict:
    numbers = range(first, first + size)
    images = [{"bytes": b"picture %d" % number, "path": None} for number in numbers]
    return {"image": images, "captions": [[f"number {number}"] for number in numbers]}


def write_parquets(folder: Path, sizes: list[int]) -> str:
    import pyarrow
    import pyarrow.parquet

    first = 0
    for shard, size in enumerate(sizes):
        rows = pyarrow.table(table(first, size))
        pyarrow.parquet.write_table(rows, folder / f"train-{shard:03d}.parquet", row_group_size=7)
        first += size
    return str(folder / f"train-{{000..{len(sizes) - 1:03d}}}.parquet") if len(sizes) > 1 else ""


def write_saved(folder: Path, sizes: list[int]) -> str:
    import datasets

    datasets.Dataset.from_dict(table(0, sum(sizes))).save_to_disk(str(folder / "saved"))
    return str(folder / "saved")


def tokenize(captions):
    return [[int(caption.split()[1]) + 1] for caption in captions]


def epoch_of(source: str, batch: int, processes: int, workers: int, start: int = 0) -> list[list[list[int]]]:
    """The numbers of the samples in each step of each process. The workers are asked as PyTorch's loader asks them."""
    per_process = []
    for number in range(processes):
        batches = StreamedBatches(open_stream(source), tokenize, 0, None)
        dealt = batches.epoch(batch, 1, 0, workers=workers, start=start, process_rank=(number, processes))
        per_process.append(
            [sorted(int(g.ids[r, 0]) - 1 for g in b.captions for r in range(len(g.rows))) for b in dealt]
        )
    return per_process


@pytest.mark.slow
@pytest.mark.parametrize("write", [write_tars, write_parquets, write_saved])
@settings(max_examples=DEALINGS, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    sizes=st.lists(st.integers(1, 50), min_size=2, max_size=12), processes=st.integers(1, 8), workers=st.integers(0, 4),
    batch=st.integers(2, 40), start=st.integers(0, 20),
)  # fmt: skip
def test_every_sample_of_a_stream_comes_exactly_once_however_it_is_dealt(
    tmp_path_factory, write, sizes, processes, workers, batch, start
):
    assume(sum(sizes) >= max(2, processes) and batch >= processes)
    if DEALINGS < 20:
        # Starting a worker takes a while; the arithmetic of more of them is that of two.
        workers = min(workers, 2 if processes > 2 else 3)
    source = write(tmp_path_factory.mktemp("stream"), sizes)
    full_epoch = epoch_of(source, batch, processes, workers)
    assert sorted(n for process in full_epoch for step in process for n in step) == list(range(sum(sizes)))
    steps = {len(process) for process in full_epoch}
    assert steps == {steps_in_epoch(sum(sizes), batch, processes)}
    assert all(step for process in full_epoch for step in process)
    # The same from any step on, in fresh readers.
    begin = min(start, max(steps) - 1)
    assert epoch_of(source, batch, processes, workers, begin) == [process[begin:] for process in full_epoch]


def test_samples_of_one_key_in_two_shards_are_two(tmp_path):
    source = write_tars(tmp_path, [3, 3])
    (batch,) = StreamedBatches(open_stream(source), tokenize, 0, None).epoch(6, 1, 0)
    assert len(batch.identity.unique()) == 6
    assert batch.positives.sum() == 6


def test_a_shard_that_is_not_what_its_index_says_is_an_error(tmp_path):
    source = write_tars(tmp_path, [5, 5])
    for said, message in ((4, "holds more samples where 4 were counted"), (6, "holds 5 samples where 6 were counted")):
        (tmp_path / "shards.json").write_text(json.dumps({"train-000.tar": said, "train-001.tar": 5}))
        with pytest.raises(DataError, match=message):
            list(StreamedBatches(open_stream(source), tokenize, 0, None).epoch(5, 1, 0))


def test_what_webdataset_passes_over_is_not_counted(tmp_path):
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        for name in ("__meta__/about.json", "a.png", "a.txt", "README", "b.png", "b.txt", "__meta__.json"):
            add(tar, name, b"x")
    stream = open_stream(str(tmp_path))
    samples = list(stream.read(1, 0, 0, stream.count))
    assert sorted(sample.name for sample in samples if not sample.error) == ["train-0.tar, a", "train-0.tar, b"]


def test_shards_belong_to_the_split_that_their_names_tell(tmp_path):
    assert [split_in_name(Path(name)) for name in ("a-train-0.tar", "dev_0.tar", "VALIDATION.tar", "trainer-1.tar")] == [
        "train", "dev", "dev", "",
    ]  # fmt: skip
    for name, count in (("flickr-train-000", 4), ("flickr-train-001", 3), ("dev-000", 2), ("flickr-test-0", 5)):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            for index in range(count):
                add(tar, f"{index}.png", b"x")
                add(tar, f"{index}.txt", b"words")
    assert open_stream(str(tmp_path)).count == 7
    assert len(read_stream_split(str(tmp_path), "dev")) == 2
    (tmp_path / "more.tar").write_bytes((tmp_path / "dev-000.tar").read_bytes())
    with pytest.raises(DataError, match=r"1 of 5 .tar files are of no split by their names, such as more.tar"):
        open_stream(str(tmp_path))


@pytest.mark.parametrize(
    ("about", "text", "captions", "message"),
    [
        ({"captions": ["a", None, "b"]}, None, ("a", "b"), ""),
        ({"captions": None}, None, (), "no caption"),
        ({"captions": None, "caption": "a"}, None, ("a",), ""),
        ({"captions": 5}, None, (), "int where a text belongs"),
        ({"captions": [5]}, None, (), "int where a text belongs"),
        ({"captions": [{"raw": None, "caption": "a"}]}, None, ("a",), ""),
        ({"width": 5}, "a dog\u2028runs\nit runs", ("a dog runs", "it runs"), ""),
        ({}, None, (), "no caption"),
    ],
)
def test_captions_are_read_or_what_is_wrong_is_told(tmp_path, about, text, captions, message):
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        add(tar, "0.png", b"x")
        add(tar, "0.json", json.dumps(about).encode())
        if text is not None:
            add(tar, "0.txt", text.encode())
    (sample,) = open_stream(str(tmp_path)).read(1, 0, 0, 1)
    assert sample.captions == captions
    assert message in sample.error
    assert bool(message) == bool(sample.error)
    if about and text is None:
        import pyarrow
        import pyarrow.parquet

        if list(about) == ["captions"]:
            table = pyarrow.table({"image": [{"bytes": b"x"}], "captions": pyarrow.array([about["captions"]])})
            for number in range(2):
                pyarrow.parquet.write_table(table, tmp_path / f"train-{number}.parquet")
            sample = next(open_stream(str(tmp_path / "train-{0..1}.parquet")).read(1, 0, 0, 1))
            assert sample.captions == captions
            assert message in sample.error


def test_a_streams_dev_images_keep_their_identities_and_what_was_left_out_is_told(tmp_path):
    with tarfile.open(tmp_path / "dev-0.tar", "w") as tar:
        for index in range(6):
            add(tar, f"{index}.png", b"x%d" % index)
            about = {"captions": [f"words {index}"], "identity": index // 2} if index < 5 else {}
            add(tar, f"{index}.json", json.dumps(about).encode())
    dev = read_stream_split(str(tmp_path), "dev")
    # The first person is number 0, which is a name like any other.
    assert [row.identity for row in dev] == ["0", "0", "1", "1", "2"]
    assert len(set(dev.image_identity.tolist())) == 3
    assert [(problem.place, problem.message) for problem in dev.problems] == [("dev-0.tar, 5", "no caption")]
