"""Weights files that are mapped: their pages are released, and nothing that was written is."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pretrained_models import make_pretrained
from safetensors.torch import load_file, save_file

from clipvisionalign.models.file_pages import copy_and_release, release_pages
from clipvisionalign.models.io import load_aligner

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pages are released on Linux alone")
SIZE = 2**22


def resident_kib(tensor):
    """KiB of the file's pages under a tensor that this process has read."""
    start, is_its_mapping = tensor.data_ptr(), False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            is_its_mapping = int(match[1], 16) <= start < int(match[2], 16)
        elif is_its_mapping and line.startswith("Rss:"):
            return int(line.split()[1])
    return 0


@pytest.fixture
def mapped(tmp_path):
    save_file({"a": torch.arange(SIZE, dtype=torch.float32), "b": torch.ones(SIZE)}, tmp_path / "a.safetensors")
    return load_file(tmp_path / "a.safetensors")


def test_pages_that_were_read_are_released_and_read_again(mapped):
    total = mapped["a"].sum().item()
    before = resident_kib(mapped["a"])
    assert before >= SIZE * 4 // 1024
    release_pages(mapped["a"])
    assert resident_kib(mapped["a"]) < before - 0.9 * SIZE * 4 // 1024
    assert mapped["a"].sum().item() == total
    assert mapped["b"].sum().item() == SIZE


def test_what_was_written_to_a_mapping_or_never_was_in_a_file_is_kept(mapped):
    mapped["a"][7] = -1.0
    mapped_sum = mapped["a"][8:].sum()
    allocated, view = torch.full((SIZE,), 3.0), torch.ones(64, 64).T
    for tensor in (mapped["a"], mapped["b"], allocated, view, torch.empty(0)):
        release_pages(tensor)
    # The rest of a mapping that was written to is released all the same.
    assert resident_kib(mapped["a"]) < SIZE * 4 // 1024 // 10
    assert mapped["a"][7] == -1.0
    assert mapped["a"][8:].sum() == mapped_sum
    assert (allocated == 3.0).all()
    assert (view == 1.0).all()


def test_a_copy_is_whole_and_leaves_no_page(mapped, monkeypatch):
    from clipvisionalign.models import file_pages

    monkeypatch.setattr(file_pages, "_COPIED_BYTES", 1 << 20)
    for shape in ((SIZE,), (7, SIZE // 7), (1, SIZE), (SIZE, 1), ()):
        source = mapped["a"][: torch.Size(shape).numel()].view(shape)
        target = torch.empty(shape)
        copy_and_release(target, source)
        assert torch.equal(target.flatten(), torch.arange(target.numel(), dtype=torch.float32))
    copy_and_release(torch.empty(0, 3), torch.empty(0, 3))
    release_pages(mapped["a"])
    copy_and_release(torch.empty(SIZE), mapped["a"])
    assert resident_kib(mapped["a"]) < SIZE * 4 // 1024 // 10


LOAD = """
import sys
from pathlib import Path
import transformers.models.clip.modeling_clip, timm
from clipvisionalign.models.io import load_aligner
from clipvisionalign.study.profile import peak_memory
load_aligner(Path(sys.argv[1]), "cpu")
before = peak_memory()
load_aligner(Path(sys.argv[2]), "cpu")
print((peak_memory() - before) / 2**20)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["transformers", "run"])
def test_a_model_is_not_in_memory_twice_while_it_is_loaded(tmp_path, kind):
    """Weights of 577 MiB: less than one and a quarter of it above what a process has that has loaded a small model."""
    folders = [make_pretrained("clip", tmp_path / size, size) for size in ("tiny", "base")]
    size = (folders[1] / "model.safetensors").stat().st_size / 2**20
    if kind == "run":
        for folder in folders:
            load_aligner(folder, "cpu").save(folder.with_suffix(".run"))
        folders = [folder.with_suffix(".run") for folder in folders]
    command = [sys.executable, "-c", LOAD, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert 0.5 * size < float(done.stdout.splitlines()[-1]) < 1.25 * size
