"""Loads the shim by which the CPU build of torch handles fake CUDA tensors. It has to be imported before torch.

It is compiled once per installation of torch and per source, in seconds by g++, into the folder of temporary files.
"""

import ctypes
import hashlib
import importlib.metadata
import os
import pathlib
import subprocess
import sys
import sysconfig
import tempfile

SOURCE = pathlib.Path(__file__).with_name("shim.cpp")
_LOADED: list[ctypes.CDLL] = []


def load_shim() -> None:
    """Builds the shim if need be and loads it, once in a process."""
    if _LOADED:
        return
    assert "torch" not in sys.modules, "torch asks the hooks once, when it is imported"
    torch = pathlib.Path(sysconfig.get_paths()["purelib"], "torch")
    # The library finds torch's own by their folder, which is gone as soon as another clone's environment is deleted.
    version = f"{torch} {importlib.metadata.version('torch')} {sys.version} {SOURCE.read_text()}"
    name = f"gpsd_fake_cuda_{hashlib.sha256(version.encode()).hexdigest()[:16]}_{os.getuid()}.so"
    library = pathlib.Path(tempfile.gettempdir(), name)
    if not library.is_file():
        aside = library.with_name(f"{name}.{os.getpid()}")
        flags = ["-std=c++20", "-O1", "-fPIC", "-shared", f"-I{torch}/include", f"-L{torch}/lib"]
        flags += [f"-Wl,-rpath,{torch}/lib"]
        subprocess.run(["g++", *flags, SOURCE, "-o", aside, "-lc10", "-ltorch_cpu"], check=True)
        aside.replace(library)
    _LOADED.append(ctypes.CDLL(str(library)))
