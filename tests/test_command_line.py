"""The command line as it is typed: usage errors with suggestions, checks before a model is loaded, how much is printed."""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from clipvisionalign.cli import COMMANDS, main
from clipvisionalign.cli.commands import PARSERS, RESUMED
from clipvisionalign.cli.parser import suggest
from clipvisionalign.counts import count_noun

LOADERS = ("clipvisionalign.search.encoder.open_text_tower", "clipvisionalign.models.io.load_aligner")


@pytest.fixture
def no_model(monkeypatch):
    """Loading a model fails the test."""
    for loader in LOADERS:
        monkeypatch.setattr(loader, lambda *given, **more: pytest.fail("a model was loaded"))


@pytest.fixture(scope="module")
def index(tmp_path_factory, scenes_folder, tiny_runs) -> Path:
    """An index of twelve images, without captions, by a run of the design `self`."""
    folder = tmp_path_factory.mktemp("command_line")
    (folder / "images").mkdir()
    for path in sorted((scenes_folder / "images").rglob("*.*"))[:12]:
        shutil.copy(path, folder / "images")
    assert main(["index", str(tiny_runs["self"]), str(folder / "images"), "--out", str(folder / "index")]) == 0
    return folder / "index"


def usage_error(arguments: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "nearest"),
    [
        (["serach", "INDEX"], "search"),
        (["search", "INDEX", "dog", "--cuont", "3"], "--count"),
        (["search", "INDEX", "--mius=dog"], "--minus"),
        (["train", "DATA", "--modle.design", "self"], "--model.design"),
        (["train", "DATA", "--model.desing=self"], "--model.design"),
        (["train", "DATA", "--model.design", "slef"], "self"),
        (["study", "scenes", "--same", "picture"], "pictures"),
        (["evaluate", "RUN", "--splt", "dev"], "--split"),
    ],
)
def test_a_usage_error_names_the_nearest_word_and_is_no_page(arguments, nearest, capsys):
    message = usage_error(arguments, capsys)
    assert f"did you mean '{nearest}'?" in message
    assert len(message.splitlines()) <= 3


@pytest.mark.parametrize("flag", ["--lr", "--learning-rate", "--learning_rate"])
def test_a_flag_that_is_the_last_word_of_some_names_them(flag, capsys):
    message = usage_error(["train", "DATA", flag, "1e-4"], capsys)
    assert "did you mean '--text_lr', '--image_lr' or '--head_lr'?" in message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--distill", "nonsense"], "--distill: should be a number, not 'nonsense': weight of a loss that keeps"),
        (["--epochs", "1.5"], "--epochs: should be a whole number, not '1.5': passes over the training images"),
        (["--model.width", "abc"], "--model.width: should be a whole number, not 'abc': width of the common space"),
        (["--freeze", "imag"], "not 'imag': which towers stay as they are"),
    ],
)
def test_a_value_of_another_type_is_answered_with_what_the_setting_is(arguments, words, capsys):
    message = usage_error(["train", "DATA", *arguments], capsys)
    assert words in message.splitlines()[0]
    assert len(message.splitlines()) == 2


def test_nothing_is_suggested_for_what_is_like_nothing(capsys):
    assert "did you mean" not in usage_error(["search", "INDEX", "--zzzzzz"], capsys)
    assert suggest("the following arguments are required: run", ["--run"]) == ""


def test_a_key_of_a_file_of_settings_gets_a_suggestion(tmp_path, capsys):
    (tmp_path / "own.yaml").write_text("model: {desing: late}\n")
    assert "did you mean 'design'?" in usage_error(["train", "DATA", "--config", str(tmp_path / "own.yaml")], capsys)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([""], "a term needs words"),
        ([], "something to look for"),
        (["--minus", "dog"], "something to look for"),
        (["dog", "--rerank", "5"], "has nothing to re-rank with"),
        (["dog", "--captions"], "has no captions"),
        (["dog", "--where", "colour = 3"], "no column 'colour'"),
        (["dog", "--where", "width >"], "at its end: expected a number"),
        (["dog", "--count", "0"], "at least 1"),
        (["--like", "nowhere.jpg"], "nowhere.jpg"),
    ],
)
def test_a_query_is_refused_before_a_model_is_loaded(index, no_model, arguments, words, capsys):
    assert main(["search", str(index), *arguments]) == 1
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("evaluate RUN --candidates 3", "has nothing to re-rank with"),
        ("evaluate RUN --data nowhere", "no such file or folder"),
        ("evaluate RUN --split none", "none"),
        ("audit RUN --data nowhere", "no such file or folder"),
        ("encode RUN --out new.npy --distractors nowhere", "no such folder"),
        ("encode RUN --out new.npy --data nowhere", "no such file or folder"),
    ],
)
def test_a_run_is_not_loaded_for_what_is_refused_anyway(
    tiny_runs, no_model, tmp_path, monkeypatch, command, words, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main(command.replace("RUN", str(tiny_runs["self"])).split()) == 1
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("image", "caption", "words"),
    [("a.jpg", "", "needs words"), ("a.jpg", "  ", "needs words"), ("no.jpg", "a dog", "no.jpg")],
)
def test_a_map_of_no_caption_or_no_image_is_not_drawn(
    tiny_runs, no_model, tmp_path, monkeypatch, image, caption, words, capsys
):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (32, 32)).save("a.jpg")
    assert main(["explain", str(tiny_runs["self"]), image, caption]) == 1
    assert words in capsys.readouterr().err
    assert not Path("explanation.png").exists()


def test_data_that_is_not_there_is_told_before_the_run_folder(tiny_runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "self").mkdir(parents=True)
    (tmp_path / "runs" / "self" / "mine").write_text("x")
    assert main(["train", "nowhere", "--out", "runs/self"]) == 1
    message = capsys.readouterr().err
    assert "nowhere: no such file or folder" in message
    assert "is there already" not in message


def test_a_filter_that_nothing_matches_prints_no_empty_table(index, capsys):
    assert main(["search", str(index), "dog", "--where", "width > 100000"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "nothing found where width > 100000" in printed.err


def test_a_pattern_as_sql_has_them_that_finds_nothing_gets_the_sign_that_is_meant(index, capsys):
    for where, noted in (('path like "none/%"', True), ("path LIKE '%none'", True), ('path like "none/%*"', False)):
        assert main(["search", str(index), "dog", "--where", where]) == 1
        assert ("a * stands for anything" in capsys.readouterr().err) is noted


def test_another_index_among_the_words_is_noted(index, capsys):
    assert main(["search", str(index), str(index), "dog"]) == 0
    assert f"'{index}' is an index, and taken as words" in capsys.readouterr().err
    assert main(["search", str(index), "dog " * 2000]) == 0
    assert "is an index" not in capsys.readouterr().err


def test_a_word_with_a_dash_is_not_understood_and_how_to_avoid_it_is_told(index, capsys):
    with pytest.raises(SystemExit):
        main(["search", str(index), "beach", "-dog"])
    assert "--minus" in capsys.readouterr().err
    assert main(["search", str(index), "--", "-dog"]) == 0


def test_no_search_is_proposed_for_an_index_of_nothing(tiny_runs, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    out = str(tmp_path / "index")
    assert main(["index", str(tiny_runs["self"]), str(tmp_path / "images"), "--out", out]) == 1
    assert "next:" not in capsys.readouterr().out
    (tmp_path / "images" / "bad.jpg").write_bytes(b"no image")
    main(["index", str(tiny_runs["self"]), str(tmp_path / "images"), "--out", out])
    printed = capsys.readouterr().out
    assert "next:" not in printed
    assert "1 file could not be decoded" in printed


@pytest.mark.parametrize("columns", [44, 60, 100])
def test_previews_are_whole_on_a_narrow_terminal(columns, monkeypatch, capsys):
    from clipvisionalign.cli.output import print_hits
    from clipvisionalign.search.hits import Hit

    monkeypatch.setenv("COLUMNS", str(columns))
    file = io.BytesIO()
    Image.new("RGB", (64, 48), "white").save(file, "JPEG")
    print_hits(
        "dog",
        [],
        [Hit(1, "a/long/path/to/an/image-0001.jpg", 0.5, 640, 480, 9, {"year": 2020})],
        {1: file.getvalue()},
    )
    lines = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    assert max(map(len, lines)) <= columns
    drawn = [match[0] for line in lines if (match := re.search(r"[^ │\w/.:-]{8,}(?= │)", line)) and "│" in line]
    assert {len(row) for row in drawn} == {min(24, columns // 3)}


def test_counts_have_the_number_of_their_noun(tmp_path, capsys):
    assert [count_noun(count, "image") for count in (0, 1, 2)] == ["0 images", "1 image", "2 images"]
    Image.new("RGB", (32, 32)).save(tmp_path / "a.jpg")
    (tmp_path / "metadata.csv").write_text("file_name,caption\na.jpg,a dog\n")
    main(["check", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "1 image (" in printed
    assert "1 caption\n" in printed
    assert not re.search(r"\b1 (images|captions|rows)\b", printed)


def test_quiet_prints_the_result_alone(tiny_runs, capsys, monkeypatch):
    monkeypatch.setenv("CLIPVISIONALIGN_PROGRESS_SECONDS", "0.01")
    for arguments in (["--quiet", "evaluate", str(tiny_runs["self"])], ["evaluate", str(tiny_runs["self"]), "--quiet"]):
        assert main(arguments) == 0
        printed = capsys.readouterr()
        assert "R@1" in printed.out
        assert printed.err == ""
    # An error is printed all the same, and the next command is not quiet.
    assert main(["check", "nowhere", "--quiet"]) == 1
    assert "no such file" in capsys.readouterr().err
    assert main(["evaluate", str(tiny_runs["self"])]) == 0
    assert "images" in capsys.readouterr().err


def test_verbose_prints_where_an_error_was_raised(capsys):
    assert main(["check", "nowhere", "--verbose"]) == 1
    assert "Traceback" in capsys.readouterr().err
    assert main(["check", "nowhere"]) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_no_color_is_followed(monkeypatch, capsys):
    from clipvisionalign.cli.output import print_audit

    results = {
        "run": "r",
        "data": "d",
        "split": "dev",
        "passed": True,
        "checks": [{"name": "alone", "passed": True, "meaning": "m"}],
    }
    coloured = re.compile(r"\x1b\[[0-9;]*3[0-7]")
    for set_, expected in ((False, True), (True, False)):
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setenv("NO_COLOR", "1") if set_ else monkeypatch.delenv("NO_COLOR", raising=False)
        print_audit(results)
        assert bool(coloured.search(capsys.readouterr().out)) == expected


def test_every_command_has_a_parser_and_completes(capsys):
    assert set(PARSERS) == set(COMMANDS)
    pytest.importorskip("shtab")
    for shell in ("bash", "zsh", "tcsh"):
        assert main(["completion", shell]) == 0
        script = capsys.readouterr().out
        for word in (*COMMANDS, "--minus" if shell != "tcsh" else "search"):
            assert word in script


def test_an_interrupted_command_says_how_it_is_resumed(monkeypatch, tmp_path, capsys):
    def interrupted(*given, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr("clipvisionalign.search.indexer.build_index", interrupted)
    assert main(["index", "RUN", "FOLDER", "--out", "INDEX"]) == 130
    assert "the same command resumes it" in capsys.readouterr().err
    assert {command.__name__ for command in RESUMED} == {"curve", "index", "study"}


def test_a_training_that_is_interrupted_in_its_last_measurement_says_how_it_is_resumed(
    monkeypatch, tmp_path, scenes_folder, capsys
):
    def interrupted(config):
        Path(config.out).mkdir()
        (Path(config.out) / "config.yaml").write_text("")
        raise KeyboardInterrupt

    monkeypatch.setattr("clipvisionalign.training.train.train", interrupted)
    run = tmp_path / "run"
    assert main(["train", str(scenes_folder), "--out", str(run)]) == 130
    assert f"train --resume {run}" in capsys.readouterr().err


@pytest.mark.slow
def test_ctrl_c_is_acknowledged_at_once():
    program = """
import os, signal, time
from clipvisionalign.training.stopping import stop_signal
with stop_signal() as stop:
    print("ready", flush=True)
    time.sleep(1)
    os.write(1, b"step done")
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGINT)
    output = process.communicate()[0].decode()
    assert output.index("stopping") < output.index("step done")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--freeze_layers", "*.conv_dw.weight"], ["*.conv_dw.weight"]),
        (["--freeze_layers=*.bias, text_head.*"], ["*.bias", "text_head.*"]),
        (["--freeze_layers", "[*.bias,text_head.*]"], ["*.bias", "text_head.*"]),
        (["--freeze_layers", "[\"*.bias\", 'a.b']"], ["*.bias", "a.b"]),
        (["--freeze_layers", "[]"], []),
        (["--freeze_layers", "*.layer.[0,1].*"], ["*.layer.[0,1].*"]),
        (["--freeze_layers", "[a]*.x[0]"], ["[a]*.x[0]"]),
        (["--freeze_layers", '["a,b", "c"]'], ["a,b", "c"]),
        (["--freeze_layers+", "*.bias", "--freeze_layers+=a"], ["*.bias", "a"]),
    ],
)
def test_names_of_layers_are_a_list_however_they_are_written(given, expected):
    from clipvisionalign.cli.train import _as_lists, train_parser

    assert train_parser().parse_args(_as_lists(["--data", "x", *given, "--epochs", "2"])).freeze_layers == expected
    with pytest.raises(SystemExit):
        train_parser().parse_args(_as_lists(["--data", "x", "--freeze_layers"]))
    assert _as_lists(["--freeze_layers", "--epochs", "2"]) == ["--freeze_layers", "--epochs", "2"]


@pytest.mark.parametrize("count", [1, 4000])
def test_whoever_reads_the_output_may_end_before_it(tmp_path, count):
    """Of little output, which is written at the end, and of more than a pipe holds."""
    code = (
        "import sys; from clipvisionalign.cli import commands\n"
        f"commands.COMMANDS['check'] = ('', lambda arguments: [print('x' * 100) for _ in range({count})] and 0)\n"
        "sys.exit(commands.main(['check']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ
    )
    process.stdout.close()
    assert (process.stderr.read(), process.wait(60)) == (b"", 141)
