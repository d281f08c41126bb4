"""Streams: every sample exactly once an epoch, whoever reads; what is read past is what was used."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_processes import run

from clipvisionalign import read_captioned_images
from clipvisionalign.cli import main
from clipvisionalign.data.captioned import DataError
from clipvisionalign.data.formats import is_stream
from clipvisionalign.data.streams.in_memory import read_stream_split
from clipvisionalign.data.streams.loader import StreamedBatches
from clipvisionalign.data.streams.sources import open_shards, open_stream
from clipvisionalign.data.streams.writing import write_shards


def tokenize(captions):
    return [[len(word) for word in caption.split()] for caption in captions]


def image_bytes(number: int) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (8, 8), (number % 256, number // 256, 0)).save(content, "PNG")
    return content.getvalue()


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    about = tarfile.TarInfo(name)
    about.size = len(content)
    tar.addfile(about, io.BytesIO(content))


@pytest.fixture(scope="module")
def hundred(tmp_path_factory) -> Path:
    """100 shards, written by hand, of 3 to 12 made-up images each."""
    folder = tmp_path_factory.mktemp("shards")
    number = 0
    for shard in range(100):
        with tarfile.open(folder / f"train-{shard:06d}.tar", "w") as tar:
            for _ in range(3 + shard % 10):
                add(tar, f"{number:06d}.png", image_bytes(number))
                add(tar, f"{number:06d}.txt", f"picture {number}\nthe number {number}".encode())
                number += 1
    return folder


def names(batches: StreamedBatches, **more) -> list[list[str]]:
    return [batch.names for batch in batches.epoch(8, 1, 0, **more)]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2, 3])
def test_every_sample_comes_once_an_epoch_and_in_another_order_the_next(hundred, workers):
    stream = open_shards(str(hundred / "train-{000000..000099}.tar"))
    batches = StreamedBatches(stream, tokenize, 0, None)
    first = names(batches, workers=workers)
    again = names(batches, workers=workers)
    assert first == again
    flat = [name for some in first for name in some]
    assert len(flat) == len(set(flat)) == stream.count == len(batches)
    other = [name for batch in batches.epoch(8, 2, 0, workers=workers) for name in batch.names]
    assert other != flat
    assert set(other) == set(flat)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2, 3])
@pytest.mark.parametrize("start", [1, 17, 93])
def test_a_stream_goes_on_at_any_step(hundred, workers, start):
    batches = StreamedBatches(open_stream(str(hundred)), tokenize, 0, None)
    uninterrupted = names(batches, workers=workers)
    assert names(batches, workers=workers, start=start) == uninterrupted[start:]


@pytest.mark.slow
def test_two_processes_with_two_workers_share_a_stream_and_the_rest_after_a_stop(hundred, tmp_path):
    """The second half is read by fresh processes, as after a kill."""
    given = {"data": str(hundred), "out": str(tmp_path / "names")}

    def read(**more) -> list[list[str]]:
        run(2, "shards", {**given, **more}, tmp_path / "said")
        return [
            [name for batch in json.loads((tmp_path / f"names.{process}").read_text()) for name in batch]
            for process in (0, 1)
        ]

    uninterrupted = read()
    everything = [name for process in uninterrupted for name in process]
    assert len(everything) == len(set(everything)) == 750
    begun, rest = read(stop=31), read(start=31)
    assert [a + b for a, b in zip(begun, rest, strict=True)] == uninterrupted


def test_what_shards_writes_reads_back(tmp_path, scenes_folder, capsys):
    out = tmp_path / "shards"
    assert main(["shards", str(scenes_folder), str(out), "--per-shard", "20"]) == 0
    assert "train, " in capsys.readouterr().out
    data = read_captioned_images(scenes_folder)
    assert is_stream(str(out))
    stream = open_stream(str(out))
    assert stream.count == data.split_sizes()["train"]
    transform = torch.nn.Identity()
    batches = StreamedBatches(stream, tokenize, 0, lambda image: transform(torch.tensor(len(image))))
    captions = {tuple(sorted(map(tuple, tokenize(row.captions)))) for row in data.split("train")}
    images_read = 0
    for batch in batches.epoch(16, 1, 0):
        assert batch.positives.sum(dim=1).tolist() == [5] * len(batch)
        for index in range(len(batch)):
            rows = (batch.caption_image == index).nonzero().flatten().tolist()
            own = []
            for group in batch.captions:
                for ids, mask, row in zip(group.ids, group.mask, group.rows.tolist(), strict=True):
                    own += [tuple(ids[mask.bool()].tolist())] if row in rows else []
            assert tuple(sorted(own)) in captions
            images_read += 1
    assert images_read == stream.count
    dev = read_stream_split(str(out), "dev")
    assert sorted(dev.captions) == sorted(data.split("dev").captions)
    assert main(["shards", str(scenes_folder), str(out)]) == 1
    assert "holds shards already" in capsys.readouterr().err


def test_bad_samples_are_counted_and_too_many_stop_the_training(tmp_path):
    def write(name: str, bad: int) -> StreamedBatches:
        with tarfile.open(tmp_path / name, "w") as tar:
            for number in range(60):
                add(tar, f"{number:03d}.png", b"no picture" if number < bad else image_bytes(number))
                if number != 50:
                    add(tar, f"{number:03d}.json", json.dumps({"caption": f"number {number}"}).encode())
        transform = torch.nn.Identity()

        def see(image: bytes) -> torch.Tensor:
            from clipvisionalign.images import open_image

            return transform(torch.tensor(open_image(image).size[0]))

        return StreamedBatches(open_shards(str(tmp_path / name)), tokenize, 0, see)

    few = write("train-000000.tar", bad=3)
    skipped = [reason for batch in few.epoch(10, 1, 0) for reason in batch.skipped]
    assert len(skipped) == 4
    assert sum("no caption" in reason for reason in skipped) == 1
    assert (few.sample_counts.good, few.sample_counts.bad) == (56, 4)
    with pytest.raises(DataError, match=r"samples are bad, more than 1 %; the first one: .*train-000001"):
        list(write("train-000001.tar", bad=30).epoch(10, 1, 0))


def test_shards_that_are_not_there_or_not_whole_are_told(tmp_path, hundred):
    with pytest.raises(DataError, match=r"no such shard: .*train-000100.tar \(1 missing\)"):
        open_shards(str(hundred / "train-{000098..000100}.tar"))
    (tmp_path / "train-000000.tar").write_bytes(b"this is no tar file" * 100)
    with pytest.raises(DataError, match=r"train-000000.tar: not a whole tar file"):
        open_shards(str(tmp_path))
    with pytest.raises(DataError, match="no split 'dev' beside"):
        read_stream_split(str(hundred), "dev")


def test_a_saved_hugging_face_data_set_is_a_stream(tmp_path, scenes_folder):
    import datasets

    data = read_captioned_images(scenes_folder)
    splits = {}
    for split, name in (("train", "train"), ("dev", "validation")):
        part = data.split(split)
        rows = {"image": [str(row.image) for row in part], "captions": [list(row.captions) for row in part]}
        splits[name] = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    assert is_stream(str(tmp_path / "saved"))
    batches = StreamedBatches(open_stream(str(tmp_path / "saved")), tokenize, 0, None)
    for workers in (0, 2):
        flat = [name for some in names(batches, workers=workers) for name in some]
        assert len(flat) == len(set(flat)) == data.split_sizes()["train"]
    assert sorted(read_stream_split(str(tmp_path / "saved"), "dev").captions) == sorted(data.split("dev").captions)


@pytest.mark.slow
def test_parquet_files_are_a_stream(tmp_path, scenes_folder):
    import datasets

    rows = read_captioned_images(scenes_folder).split("train").rows[:60]
    for number in range(4):
        some = rows[15 * number : 15 * number + 15]
        table = {"image": [{"bytes": row.image.read_bytes(), "path": None} for row in some]}
        table["sentences"] = [[{"raw": caption} for caption in row.captions] for row in some]
        datasets.Dataset.from_dict(table).cast_column("image", datasets.Image()).to_parquet(
            tmp_path / f"train-{number}.parquet"
        )
    pattern = str(tmp_path / "train-{0..3}.parquet")
    assert is_stream(pattern)
    stream = open_stream(pattern)
    assert stream.count == 60
    expected = sorted(tuple(row.captions) for row in rows)
    for epoch in (1, 2):
        samples = [sample for first in (0, 20) for sample in stream.read(epoch, 0, first, first + (20, 40)[first > 0])]
        assert sorted(sample.captions for sample in samples) == expected
        assert not any(sample.error for sample in samples)
        assert len({sample.name for sample in samples}) == 60
    first, again = ([sample.name for sample in stream.read(1, 0, 0, 25)] for _ in range(2))
    assert first == again
    assert first != sorted(first)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [0, 6])
def test_a_run_on_shards_goes_on_as_the_undisturbed_one(tmp_path, scenes_folder, tiny_model, chunk):
    from safetensors.torch import load_file

    from clipvisionalign.training import train as training
    from clipvisionalign.training import trainer
    from clipvisionalign.training.config import RunConfig

    write_shards(read_captioned_images(scenes_folder), tmp_path / "shards", per_shard=10)
    config = RunConfig(
        data=str(tmp_path / "shards"), out=str(tmp_path / "whole"), model=tiny_model(), epochs=2, batch=16, freeze="image",
        precision="float32", workers=0, trackers="", cache=str(tmp_path / "cache"), chunk=chunk, checkpoint_minutes=0.0,
    )  # fmt: skip
    training.train(config, say=lambda line: None)

    class StopError(Exception):
        pass

    taken = 0
    plain = trainer.forward_backward

    def stopping(*arguments):
        nonlocal taken
        taken += 1
        if taken == 8:
            raise StopError
        return plain(*arguments)

    config.out = str(tmp_path / "stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "forward_backward", stopping)
        with pytest.raises(StopError):
            training.train(config, say=lambda line: None)
    training.resume(config.out, say=lambda line: None)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_what_a_stream_counted_before_a_stop_counts_after_it(tmp_path, scenes_folder, tiny_model):
    """Captions that were cut, samples that were bad, and the limit on these."""
    from test_going_on import cut_off

    from clipvisionalign.training import train as training
    from clipvisionalign.training.config import RunConfig

    write_shards(read_captioned_images(scenes_folder), tmp_path / "shards", per_shard=200)
    shard = tmp_path / "shards" / "train-000000.tar"
    with tarfile.open(shard) as tar:
        members = [(about.name, tar.extractfile(about).read()) for about in tar]
    with tarfile.open(shard, "w") as tar:
        for number, (member, content) in enumerate(members):
            add(tar, member, content[:100] if number < 12 and not member.endswith(".json") else content)

    def settings(name: str, epochs: int) -> RunConfig:
        model = tiny_model()
        model.text_tower.max_tokens = 8
        return RunConfig(
            data=str(shard.parent), out=str(tmp_path / name), model=model, epochs=epochs, batch=16, freeze="image",
            precision="float32", workers=0, cache=str(tmp_path / "cache"), augment="none", checkpoint_minutes=0.0, trackers="",
        )  # fmt: skip

    def go_on(name: str, epochs: int, before: int) -> None:
        cut_off(settings(name, epochs), pytest.MonkeyPatch(), before=before)
        training.resume(tmp_path / name, say=lambda line: None)

    training.train(settings("whole", 1), say=lambda line: None)
    go_on("stopped", 1, before=5)
    uninterrupted, stopped = (json.loads((tmp_path / name / "data.json").read_text()) for name in ("whole", "stopped"))
    assert stopped["cut_captions"] == uninterrupted["cut_captions"]
    assert uninterrupted["cut_captions"]["train"]["cut"] > 400
    # Six bad ones an epoch: one too many comes after the stop.
    with pytest.raises(
        DataError, match=r"1\d of \d+ samples are bad, more than 1 %; the first one: .*000000.tar, 0"
    ) as error:
        training.train(settings("many", 2), say=lambda line: None)
    with pytest.raises(DataError) as repeated_error:
        go_on("many stopped", 2, before=7)
    assert str(repeated_error.value) == str(error.value)
