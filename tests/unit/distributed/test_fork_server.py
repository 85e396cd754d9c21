"""Commands that are forked: what they see of their request, how they end, and when nothing is forked. No torch here."""

import subprocess
import sys
import textwrap

import pytest

from tests.unit.test_imports import REPO_ROOT

PROGRAM = """
import os, sys, time
print(sys.argv[1:], os.environ.get("MARK"), os.getcwd(), os.getsid(0) == os.getpid(), flush=True)
if sys.argv[1] == "exit": sys.exit(int(sys.argv[2]))
if sys.argv[1] == "words": sys.exit("a message")
if sys.argv[1] == "raise": raise RuntimeError("broken")
if sys.argv[1] == "atexit":
    import atexit; atexit.register(lambda: print("goodbye"))
if sys.argv[1] == "wait": time.sleep(60)
"""
BEGIN = """
import os, signal, subprocess, sys, threading, time
from gpsd_dist.distributed import fork_server as module
module.COMMANDS, module._PRELOADED, module._is_built_for_gpu = ("program",), ("decimal",), lambda: False
def run(server, *words, **options):
    with open("out", "w") as out:
        child = server.start(("-m", "program", *words), {**os.environ, "MARK": "x"}, out, out, **options)
    return child, lambda: open("out").read()
"""


@pytest.fixture
def script(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)

    def call(code: str) -> None:
        whole = BEGIN + textwrap.dedent(code)
        env = {"PYTHONPATH": f"{REPO_ROOT}:{tmp_path}", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
        found = subprocess.run([sys.executable, "-c", whole], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert found.returncode == 0, found.stderr

    return call


def test_a_forked_command_is_like_one_that_was_started(script):
    script("""
        with module.fork_server() as server:
            child, said = run(server, "exit", "3")
            assert child.wait(10) == 3 and said() == f"['exit', '3'] x {os.getcwd()} False\\n"
            child, said = run(server, "words", in_new_session=True)
            assert child.wait(10) == 1 and said() == f"['words'] x {os.getcwd()} True\\na message\\n"
            child, said = run(server, "raise")
            assert child.wait(10) == 1 and said().endswith("RuntimeError: broken\\n")
            child, said = run(server, "atexit")
            assert child.wait(10) == 0 and said().endswith("goodbye\\n")
            assert "decimal" not in sys.modules  # the server has it
    """)


def test_what_imports_register_for_the_end_is_done(script):
    script("""
        with open("registers.py", "w") as file:
            file.write("import atexit; atexit.register(lambda: print('of an import', flush=True))")
        module._PRELOADED = ("registers",)
        with module.fork_server() as server:
            child, said = run(server, "exit", "0")
            assert child.wait(10) == 0 and said().count("of an import") == 1
    """)


def test_a_forked_command_gets_signals_and_outlives_the_server(script):
    script("""
        with module.fork_server() as server:
            child, _ = run(server, "wait")
            try:
                child.wait(0.2)
            except subprocess.TimeoutExpired:
                child.terminate()
            assert child.wait(10) == -signal.SIGTERM
            first, _ = run(server, "wait")
            second, _ = run(server, "exit", "0")
            assert second.wait(10) == 0 and first.poll() is None
        os.kill(first.pid, 0)
        os.kill(first.pid, signal.SIGKILL)
    """)


def test_signals_reach_a_command_that_has_just_begun(script):
    script("""
        with module.fork_server() as server:
            for _ in range(10):
                child, _ = run(server, "wait", in_new_session=True)
                os.killpg(child.pid, signal.SIGTERM)
                assert child.wait(10) == -signal.SIGTERM
    """)


def test_the_status_of_another_command_does_not_hide_the_own_one(script):
    script("""
        import json, socket
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        server = module.ForkServer(ours)
        child = module.Forked(2, server)
        # Both have ended between its look at the channel and that at the process.
        child._is_there = lambda: [theirs.send(json.dumps([pid, 0]).encode()) for pid in (1, 2)] == []
        assert child.poll() == 0
    """)


def test_output_that_cannot_be_written_is_an_error_as_in_python(script):
    script("""
        with module.fork_server() as server, open("/dev/full", "w") as full:
            child = server.start(("-m", "program", "exit", "0"), os.environ, full)
            assert child.wait(10) == 120
    """)


def test_streams_are_right_where_the_server_has_no_standard_input(script):
    script("""
        os.close(0)
        with module.fork_server() as server:
            child, said = run(server, "words")
            assert child.wait(10) == 1 and said().endswith("a message\\n")
    """)


def test_nothing_is_forked_for_a_request_that_nobody_waits_for_or_that_does_not_fit(script):
    script("""
        import json, socket
        with module.fork_server() as server:
            assert server.start(("-m", "program", "exit", "3"), {**os.environ, "LONG": "x" * module._MAX_BYTES}) is None
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        socket.send_fds(ours, [json.dumps({"command": ["program", "exit", "0"]}).encode()], [1, 2])
        ours.close()  # Ctrl-C while the server imports
        os.fork = lambda: 1 / 0
        module.serve(theirs)
    """)


def test_a_server_that_is_killed_is_not_waited_for(script):
    script("""
        server = module.start_server({**os.environ, "PYTHONPATH": os.environ["PYTHONPATH"]})
        assert server._program is None  # it is not started before it is asked
        server._program, server._launch = server._launch(), None
        server._program.kill()
        server._program.wait()
        assert run(server, "exit", "0")[0] is None
        assert run(server, "exit", "0")[0] is None
    """)


def test_a_command_whose_server_was_killed_is_waited_for_at_leisure(script):
    script("""
        fork, pids = os.fork, []
        os.fork = lambda: pids.append(fork()) or pids[-1]
        server, os.fork = module.fork_server(), fork
        child, _ = run(server, "wait")
        os.kill(pids[0], signal.SIGKILL)
        begin_s = time.process_time()
        try:
            child.wait(1.0)
        except subprocess.TimeoutExpired:
            child.terminate()
        assert child.wait(10) == -signal.SIGKILL and time.process_time() - begin_s < 0.5
    """)


def test_nothing_is_forked_where_it_is_not_safe(script):
    script("""
        with module.fork_server() as server:
            assert server.start(("-c", "pass"), os.environ) is None  # not one of ours
            assert server.start(("-m", "http.server"), os.environ) is None
        threading.Thread(target=time.sleep, args=(5,), daemon=True).start()
        assert module.fork_server() is None
        module._threads, module._is_built_for_gpu = list, lambda: True
        assert module.fork_server() is None and module.start_server(os.environ) is None
        del os.environ["OMP_NUM_THREADS"]
        module._is_built_for_gpu = lambda: False
        assert module.fork_server() is None
    """)
