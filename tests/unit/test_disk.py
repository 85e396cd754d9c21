"""Files are written whole or not at all and never through a link; text of files is no order to a terminal."""

import io
import json
import logging
import os
import pathlib
import stat
import types

import pytest

from data_pipeline import synthesize, validate
from data_pipeline.synthetic_log import SyntheticConfig
from gpsd_dist.checkpoint import output_lock, storage
from gpsd_dist.disk import writing
from gpsd_dist.disk.text import log_as_text, say_error, shown
from gpsd_dist.fit.display import Display
from gpsd_dist.metrics import recorder
from gpsd_dist.serving import request_log


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "a"
    writing.write(path, b"old")
    with pytest.raises(ZeroDivisionError), writing.replacing(path) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a"]
    writing.write(path, b"new")
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("umask", [0o002, 0o027])
def test_the_umask_says_who_may_use_a_file(tmp_path, umask):
    before = os.umask(umask)
    try:
        writing.write(tmp_path / "a", b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~umask


def test_the_content_is_synced_before_the_name_and_the_name_after(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda number: (done.append(os.readlink(f"/proc/self/fd/{number}")), fsync(number))
    )
    monkeypatch.setattr(os, "replace", lambda source, target: (done.append("rename"), replace(source, target)))
    writing.write(tmp_path / "a", b"x")
    assert done[0].endswith(".tmp") and done[1:] == ["rename", str(tmp_path)]


def test_names_aside_cannot_be_guessed_and_are_removed_later(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda *_: os._exit(9))
    names = set()
    for _ in range(2):
        if (child := os.fork()) == 0:
            writing.write(tmp_path / "a", b"x")
        os.waitpid(child, 0)
        names |= set(os.listdir(tmp_path))
    assert len(names) == 2 and all(len(name.split(".")[2]) == 16 for name in names)
    (tmp_path / ".of.somebody.else.tmp").touch()
    writing.remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == [".of.somebody.else.tmp"]


KINDS = {
    "link": lambda path: path.symlink_to(path.with_name("victim")),
    "pipe": os.mkfifo,
    "folder": os.mkdir,
    "device": lambda path: os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3)),
}


def _record(path: pathlib.Path) -> None:
    recorder.Recorder(path.parent, 0).close()


def _lock(path: pathlib.Path) -> None:
    with output_lock.held(path.parent, wait_s=0):
        pass


def _fit(path: pathlib.Path) -> None:
    with Display(1, path.parent).step("a step"):
        pass


def _shop_log(path: pathlib.Path) -> None:
    synthesize.write(SyntheticConfig(num_users=300, num_items=1_600, requests_per_day=50), path.parent)


WRITERS = {
    "any": (lambda path: writing.write(path, b"x"), "a"),
    "json": (lambda path: storage.write_json(path, {}), "a.json"),
    "metrics": (_record, recorder.JSONL_NAME),
    "lock": (_lock, output_lock.LOCK_NAME),
    "log of fit": (_fit, "a_step.log"),
    "made-up log": (_shop_log, "exposures.parquet"),
    "key": (lambda path: request_log.read_key(path.parent), "user_id.key"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", WRITERS)
def test_nothing_is_written_through_what_is_no_file(tmp_path, kind, name):
    write, file = WRITERS[name]
    path, victim = tmp_path / "out" / file, tmp_path / "out" / "victim"
    path.parent.mkdir()
    victim.write_text("precious")
    try:
        KINDS[kind](path)
    except PermissionError:
        pytest.skip("this user may not make devices")
    with pytest.raises(OSError, match=f"a {kind}" if kind != "device" else "device"):
        write(path)
    assert victim.read_text() == "precious"


def test_links_with_the_names_of_before_are_not_followed(tmp_path):
    """`.probe`, `NAME.tmp`: what stood beside the files until names became unpredictable."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for name in (".probe", "best.json.tmp", ".best.json.tmp", "metrics.jsonl.tmp"):
        (tmp_path / name).symlink_to(victim)
    storage.check_writable(tmp_path)
    storage.write(tmp_path / "best.json", b"{}")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    recorder.truncate_jsonl(tmp_path / "metrics.jsonl", 1)
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1}
    assert victim.read_text() == "precious"


def test_metrics_are_synced_with_their_event_files(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(recorder, "sync", synced.append)
    made = recorder.Recorder(tmp_path, 0)
    made.record("a/b", 1.0)
    made.log(1, 0.5)
    made.sync()
    made.close()
    names = {path.name for path in tmp_path.iterdir()}
    assert {path.name for path in synced} == names | {tmp_path.name} and any("tfevents" in name for name in names)


def test_names_in_a_manifest_are_no_orders_to_a_terminal(tmp_path, monkeypatch, capsys):
    split = types.SimpleNamespace(name="\x1b]0;title\x07", num_rows=3)
    monkeypatch.setattr(validate, "check", lambda folder: types.SimpleNamespace(splits=[split]))
    assert validate.main([str(tmp_path)]) == 0
    assert "is valid: \\x1b]0;title\\x07 3 rows" in capsys.readouterr().out


def test_logs_of_commands_hold_no_orders_to_a_terminal(monkeypatch):
    """Also where a traceback quotes what a file holds."""
    monkeypatch.setattr(logging.root, "handlers", [])
    stream = io.StringIO()
    log_as_text("%(levelname)s %(message)s", stream=stream)
    try:
        raise ValueError("\x1b[31m")
    except ValueError:
        logging.getLogger("x").exception("version \x1b]0;%s", "a\x9b")
    assert "ERROR version \\x1b]0;a\\x9b\nTraceback" in stream.getvalue() and "\x1b" not in stream.getvalue()


def test_control_characters_are_shown_as_text(capsys):
    assert shown("\x1b]0;title\x07\x1b[31mred\u202e\x9b") == "\\x1b]0;title\\x07\\x1b[31mred\\u202e\\x9b"
    assert shown("tab\tand\nline, é, 中, [bold]") == "tab\tand\nline, é, 中, [bold]"
    say_error(ValueError("\x1b[2J"))
    assert capsys.readouterr().err == "error: \\x1b[2J\n"
