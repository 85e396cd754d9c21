"""The Dockerfile, built for real: by buildah without a daemon, on a base image that debootstrap makes.

Needs root, Debian's packages buildah and debootstrap, and the network: Debian's archive and pip's sources.
Commands run as the image's user; the server also with a read-only root and no privileges, as in launch/k8s/serve.yaml.
"""

import contextlib
import json
import os
import pathlib
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
_MISSING = [name for name in ("buildah", "debootstrap", "unshare", "setpriv") if shutil.which(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(5400),  # ten minutes alone on two cores, beside much other work as many times that
    pytest.mark.skipif(bool(_MISSING), reason=f"{_MISSING} are missing: apt-get install buildah debootstrap"),
    pytest.mark.skipif(os.geteuid() != 0, reason="debootstrap and isolation by chroot need root"),
]
USER = "1000"
PACKAGES = "python3,python3-venv,ca-certificates"
SHOP = "--num_users 300 --num_items 1600 --requests_per_day 100"
TRAINING = (
    "--gin_file configs/stage/finetune.gin --gin_file configs/model/l1h32a4.gin --gin.STRATEGY=NT "
    "--gin.DATA_DIR=runs/data --gin.OUTPUT_DIR=runs/nt --gin.EPOCHS=1 --gin.GLOBAL_BATCH_ROWS=64 --gin.EMBEDDING_DIM=16"
)


class Images:
    """Calls buildah with a store of its own, without a bridge: chroot takes the network of this machine."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self._store = ["--root", str(folder / "store"), "--runroot", str(folder / "run"), "--storage-driver", "vfs"]
        self._mounts = _of_pip(folder)

    def call(self, command: str, *arguments: str | pathlib.Path) -> str:
        words = ["buildah", *self._store, command, *map(str, arguments)]
        result = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert result.returncode == 0, f"{shlex.join(words)}\n{result.stdout[-8000:]}"
        return result.stdout.strip()

    def build(self, name: str, *options: str) -> None:
        self.call("build", "--isolation", "chroot", "--layers=false", *self._mounts, *options, "--tag", name, ROOT)

    def container(self, image: str) -> str:
        return self.call("from", "--pull-never", image).splitlines()[-1]

    def run(self, container: str, command: str, *options: str) -> str:
        """Runs a line of shell as the image's user, in its folder."""
        return self.call("run", "--isolation", "chroot", *options, container, "--", "bash", "-euc", command)


def _of_pip(folder: pathlib.Path) -> list[str]:
    """Volumes that bring the configuration of this machine's pip, and the folders that it names, into a build alone."""
    found = {}
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    for line in listed.stdout.splitlines():
        name, _, value = line.partition("=")
        found[name.removeprefix(":env:.").removeprefix("global.")] = value.strip("'")
    (folder / "pip.conf").write_text("\n".join(["[global]", *(f"{name} = {value}" for name, value in found.items())]))
    mounts = {folder / "pip.conf": "/etc/pip.conf"}
    for word in " ".join(found.values()).split():
        path = pathlib.Path(word.removeprefix("file://"))
        path = path.parent if path.name == "simple" else path  # an index links to files beside it
        if path.is_absolute() and path.exists():
            mounts[path] = str(path)
    return [f"--volume={source}:{target}:ro" for source, target in mounts.items()]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """An image `base` with Debian's Python, in the place of python:3.11-slim-bookworm."""
    folder = tmp_path_factory.mktemp("images")
    found = Images(folder)
    root = folder / "base"
    made = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", root]
    result = subprocess.run(made, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert result.returncode == 0, result.stdout[-4000:]
    (root / "Dockerfile").write_text("FROM scratch\nCOPY . /\n")
    found.call("build", "--isolation", "chroot", "--tag", "base", root)
    shutil.rmtree(root)
    yield found
    found.call("rm", "--all")
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def artefact(images):
    """Trains in the image for training, as a user would, and exports; a folder outside of it."""
    images.build("train", "--build-arg", "BASE=localhost/base", "--build-arg", "FLAVOR=cpu")
    outside = images.folder / "runs"
    outside.mkdir()
    os.chown(outside, int(USER), int(USER))
    container, runs = images.container("localhost/train"), f"--volume={outside}:/app/runs"
    assert images.run(container, "id -u; pwd") == f"{USER}\n/app"
    assert " 0 failed" in images.run(container, "python -m gpsd_dist.doctor")
    images.run(container, f"python -m data_pipeline.synthesize --out_dir runs/raw {SHOP}", runs)
    images.run(container, "python -m data_pipeline.build --source generic --raw_dir runs/raw --out_dir runs/data", runs)
    images.run(container, f"NPROC=2 launch/local.sh {TRAINING}", runs)
    images.run(container, "python -m gpsd_dist.export --checkpoint runs/nt --data runs/data --out runs/ctr", runs)
    return outside / "ctr"


def test_the_image_for_training_trains_as_an_ordinary_user(artefact):
    assert (artefact / "current.json").exists()
    assert {path.stat().st_uid for path in artefact.rglob("*")} == {int(USER)}


def test_the_image_for_serving_serves_from_a_read_only_root(images, artefact):
    images.build("serve", "--build-arg", "BASE=localhost/base", "--target", "serve")
    container = images.container("localhost/serve")
    facts = json.loads(images.call("inspect", "--type", "image", "localhost/serve"))["OCIv1"]["config"]
    assert facts["User"] == USER and facts["Cmd"] == ["/artefact", "--host", "0.0.0.0"]
    root = pathlib.Path(images.call("mount", container))
    assert not list((root / "opt/venv/lib").rglob("torchrec"))
    (root / "artefact").mkdir()
    with _served(root, artefact, [*facts["Entrypoint"], "/artefact"], facts["Env"]) as address:
        (examples,) = artefact.glob("versions/*/examples.json")
        request = json.loads(examples.read_text())["requests"][:1]
        body = json.dumps({"requests": request}).encode()
        asked = urllib.request.Request(f"{address}/v1/score", body, {"content-type": "application/json"})
        (answer,) = json.loads(urllib.request.urlopen(asked, timeout=30).read())["answers"]
        assert answer["tasks"]["click"]["logit"]


@contextlib.contextmanager
def _served(root: pathlib.Path, artefact: pathlib.Path, command: list[str], variables: list[str]):
    """Serves on loopback: nothing but /tmp can be written, no capability is left, and none can be gained."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ordinary = f"setpriv --reuid={USER} --regid={USER} --clear-groups --bounding-set=-all --no-new-privs"
    inside = shlex.join(["env", "-i", *variables, *command, "--host", "127.0.0.1", "--port", str(port)])
    script = f"""set -e
mount --rbind {root} {root}
mount --bind {artefact} {root}/artefact
mount -o remount,ro,bind {root}/artefact
mount -t proc proc {root}/proc
mount --rbind /dev {root}/dev
mount -t tmpfs tmpfs {root}/tmp
mount -o remount,ro,bind {root}
cd {root}
exec chroot . {ordinary} sh -c 'cd /app; ! touch here 2>/dev/null; exec {inside}'
"""
    unshare = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script]
    server = subprocess.Popen(unshare, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    address, until_s = f"http://127.0.0.1:{port}", time.monotonic() + 120
    try:
        while not _is_ready(address):
            assert server.poll() is None and time.monotonic() < until_s, server.stdout and server.stdout.read()
            time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.communicate(timeout=60)
    assert server.returncode == 0


def _is_ready(address: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/v2/health/ready", timeout=5) as answer:
        return answer.status == 200
    return False
