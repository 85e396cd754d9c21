"""A damaged checkpoint is found: a run goes back to the one before it, transfer and evaluation stop with its name."""

import shutil

import pytest

from gpsd_dist.checkpoint import integrity, manager, retention
from gpsd_dist.checkpoint.__main__ import main
from gpsd_dist.checkpoint.integrity import DamagedCheckpoint
from gpsd_dist.trained_run import evaluate_checkpoint
from gpsd_dist.trainer import Trainer
from tests.integration.tiny_data import differing, edit_state, read_checkpoint, step_folder, tiny_run, train_losses

pytestmark = pytest.mark.timeout(300)
TRAIN = {"save_interval_steps": 2, "keep_last": 3}


def _run(data_dir, output_dir, max_steps: int, **train):
    return tiny_run("finetune", data_dir, output_dir, train=TRAIN | {"max_steps": max_steps} | train)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data_dir, one_rank):
    """`whole`: 6 steps at once. `half`: 4 of them, checkpoints of 2 and 4."""
    root = tmp_path_factory.mktemp("damaged")
    Trainer(_run(data_dir, root / "whole", 6), one_rank).train()
    Trainer(_run(data_dir, root / "half", 4), one_rank).train()
    return root


def _flip(path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "flipped": ("__0_0.distcp", _flip, "__0_0.distcp is not what was written"),
    "truncated": ("__0_0.distcp", lambda path: path.write_bytes(path.read_bytes()[:-100]), "__0_0.distcp has"),
    "missing": ("__0_0.distcp", lambda path: path.unlink(), "__0_0.distcp is missing"),
    "index": ("index.json", _flip, "index.json is not what was written"),
    "no index": ("index.json", lambda path: path.unlink(), "index.json is missing"),
    "index of DCP": (".metadata", _flip, ".metadata is not what was written"),
    "state": ("run_state.json", lambda path: path.write_text("{"), "run_state.json has 1 bytes"),
    "no checksums": (
        "checksums.json",
        lambda path: path.unlink(),
        "checksums.json is missing, and run_state.json says",
    ),
    "checksums": ("checksums.json", lambda path: path.write_bytes(path.read_bytes()[:-9]), "checksums.json is damaged"),
}


@pytest.mark.parametrize("damage", ["flipped", "missing", "no checksums", "state"])
def test_resume_falls_back_and_ends_where_the_whole_run_does(trained, data_dir, tmp_path, one_rank, caplog, damage):
    name, apply, message = DAMAGES[damage]
    shutil.copytree(trained / "half", tmp_path / "run")
    damaged = step_folder(tmp_path / "run", 4)
    apply(damaged / name)
    with caplog.at_level("INFO"):
        logger = manager.log.parent
        logger.addHandler(caplog.handler)
        try:
            Trainer(_run(data_dir, tmp_path / "run", 6), one_rank).train()
        finally:
            logger.removeHandler(caplog.handler)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert any(message in text and str(damaged) in text and "checkpoint before it" in text for text in warnings)
    assert any("set aside" in text for text in warnings)
    assert f"resumed from {step_folder(tmp_path / 'run', 2)}" in caplog.text
    for step in (4, 6):  # 4 was trained and saved again
        parts = [read_checkpoint(step_folder(root, step)) for root in (trained / "whole", tmp_path / "run")]
        assert not differing(*parts), step
    assert train_losses(tmp_path / "run") == train_losses(trained / "whole")


@pytest.mark.parametrize("damage", DAMAGES)
def test_evaluation_and_transfer_stop_with_the_name_of_the_file(trained, data_dir, tmp_path, one_rank, damage):
    name, apply, message = DAMAGES[damage]
    shutil.copytree(step_folder(trained / "half", 4), tmp_path / "copy")
    apply(tmp_path / "copy" / name)
    # evaluation reads options and shapes before it compares the checksums of all files
    index = r"index\.json is (refused as the index|not what was written)"
    earlier = {"state": "cannot be read as a run state", "index": index}
    expected = earlier.get(damage, message)
    with pytest.raises(ValueError, match=expected) as error:
        evaluate_checkpoint(tmp_path / "copy", None, "valid", one_rank)
    assert str(tmp_path / "copy") in str(error.value)
    run = tiny_run("finetune", data_dir, tmp_path / "out", "ST", tmp_path / "copy")
    with pytest.raises(ValueError, match=expected):
        Trainer(run, one_rank).train()


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew(trained, data_dir, tmp_path, one_rank):
    shutil.copytree(trained / "half", tmp_path / "run")
    for path in retention.complete(tmp_path / "run/checkpoints"):
        (path / ".metadata").unlink()
    with pytest.raises(ValueError, match=r"no checkpoint in .* is intact, so this run cannot go on"):
        Trainer(_run(data_dir, tmp_path / "run", 6), one_rank)


def test_checkpoints_of_older_versions_still_resume(trained, data_dir, tmp_path, one_rank, caplog):
    """Without checksums, and with options that did not exist then."""
    shutil.copytree(trained / "half", tmp_path / "run")
    for path in retention.complete(tmp_path / "run/checkpoints"):
        edit_state(path, lambda state: state.pop("has_checksums"))
        (path / integrity.CHECKSUMS_NAME).unlink()
    Trainer(_run(data_dir, tmp_path / "run", 6), one_rank).train()
    parts = [read_checkpoint(step_folder(root, 6)) for root in (trained / "whole", tmp_path / "run")]
    assert not differing(*parts)


def test_unreadable_old_checkpoint_is_an_error_with_its_name(trained, tmp_path, one_rank):
    shutil.copytree(step_folder(trained / "half", 4), tmp_path / "copy")
    edit_state(tmp_path / "copy", lambda state: state.pop("has_checksums"))
    (tmp_path / "copy" / integrity.CHECKSUMS_NAME).unlink()
    path = tmp_path / "copy/__0_0.distcp"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(DamagedCheckpoint, match=f"checkpoint {tmp_path}/copy cannot be read: rank 0"):
        evaluate_checkpoint(tmp_path / "copy", None, "valid", one_rank)
    path.write_bytes(b"short")
    with pytest.raises(ValueError, match=r"speaks of [\d,]+ bytes of __0_0.distcp, which has 5"):
        evaluate_checkpoint(tmp_path / "copy", None, "valid", one_rank)


def test_list_shows_every_checkpoint_and_marks_the_best(trained, capsys):
    assert main(["list", str(trained / "whole")]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line for line in lines if line.strip().startswith("step_")}
    assert sorted(rows) == ["step_00000002", "step_00000004", "step_00000006"]
    assert "best" in rows["step_00000006"] and "best" not in rows["step_00000004"]
    assert " 1.00 " in rows["step_00000006"] and " 0.67 " in rows["step_00000004"]  # an epoch has 6 steps
    assert "all there" in rows["step_00000002"]
    assert any("click/auc 0." in line for line in lines)


def test_list_names_what_is_missing(trained, tmp_path, capsys):
    shutil.copytree(trained / "half", tmp_path / "run")
    (step_folder(tmp_path / "run", 2) / "__0_0.distcp").unlink()
    (step_folder(tmp_path / "run", 9)).mkdir()
    assert main(["list", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "damaged: __0_0.distcp is missing" in out and "unfinished" in out


def test_verify_exits_with_1_and_names_the_damaged_files(trained, tmp_path, capsys):
    shutil.copytree(trained / "half", tmp_path / "run")
    assert main(["verify", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.count(": ok, 4 files") == 2
    _flip(step_folder(tmp_path / "run", 2) / ".metadata")
    assert main(["verify", str(tmp_path / "run")]) == 1
    out = capsys.readouterr().out
    assert "step_00000002 is damaged: .metadata is not what was written" in out and out.count(": ok, 4 files") == 1
    assert main(["verify", str(step_folder(tmp_path / "run", 4))]) == 0


def test_diff_compares_tensors_and_options(trained, tmp_path, data_dir, one_rank, capsys):
    whole = str(trained / "whole")
    assert main(["diff", whole, str(step_folder(whole, 6))]) == 0
    assert "same tensors, step and options" in capsys.readouterr().out
    run = tiny_run("finetune", data_dir, tmp_path / "wide", model={"width": 32}, train={"max_steps": 2, "epochs": 4})
    Trainer(run, one_rank).train()
    assert main(["diff", whole, str(tmp_path / "wide")]) == 1
    lines = {line.split("  ")[1].strip(): line for line in capsys.readouterr().out.splitlines() if line.count("  ") > 1}
    assert "max abs difference" in lines["table.item"] and "of 976 values" in lines["table.item"]
    assert "A (48, 16) torch.float32, B (96, 32) torch.float32" in lines["dense.backbone.tower.blocks.0.qkv.weight"]
    assert "A 16, B 32" in lines["option model.width"] and "A 3, B 4" in lines["option train.epochs"]
    assert "A 6, B 2" in lines["step"]
    pretrained = tiny_run("pretrain", data_dir, tmp_path / "pre", train={"max_steps": 1})
    Trainer(pretrained, one_rank).train()
    assert main(["diff", whole, str(tmp_path / "pre")]) == 1
    assert "only in A" in capsys.readouterr().out


def test_prune_deletes_old_ones_but_not_the_best(trained, tmp_path, capsys):
    shutil.copytree(trained / "whole", tmp_path / "run")
    folder = tmp_path / "run/checkpoints"
    (folder / "best.json").write_text('{"step": 2, "metrics": {}}')
    edit_state(step_folder(tmp_path / "run", 6), lambda state: state["progress"].update(best_step=2))
    assert main(["prune", str(tmp_path / "run"), "--keep_last", "1", "--dry_run"]) == 0
    assert f"would delete {step_folder(tmp_path / 'run', 4)}" in capsys.readouterr().out
    assert len(retention.complete(folder)) == 3
    assert main(["prune", str(tmp_path / "run"), "--keep_last", "1"]) == 0
    assert "kept: step_00000002, step_00000006" in capsys.readouterr().out
    assert [path.name for path in retention.step_folders(folder)] == ["step_00000002", "step_00000006"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["list", "/nowhere"], "/nowhere/checkpoints holds no checkpoint"),
        (["verify", "/nowhere"], "/nowhere is neither a run folder"),
        (["diff", "/nowhere", "/else"], "/nowhere is neither a run folder"),
        (["prune", "/nowhere", "--keep_last", "1"], "/nowhere is neither a run folder"),
        (["prune", "/nowhere", "--keep_last", "0"], "--keep_last 0 must be >= 1"),
        (["list", "s4://bucket/run"], "Protocol not known: s4"),
    ],
)
def test_mistakes_are_explained(capsys, arguments, message):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
