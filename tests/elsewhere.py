"""Commands in an interpreter of its own that lacks what other systems lack: a sitecustomize takes it away first."""

import os
import subprocess
import sys
from pathlib import Path

from folders import Folder

ROOT = Path(__file__).parent.parent
MACOS = "import os; del os.sched_getaffinity"
# No fcntl, none of these signals, and folders that cannot be opened. As here are no locks of Windows's, none are left.
WINDOWS = f"""{MACOS}
import shutil, signal, sys
for name in ("SIGUSR1", "SIGHUP", "SIGXCPU"):
    delattr(signal, name)
for name in ("fcntl", "resource", "pwd", "grp"):
    sys.modules[name] = None
def opened(path, *args, call=os.open, **named):
    if named.get("dir_fd") is None and os.path.isdir(path):
        raise PermissionError(13, "Permission denied", path)
    return call(path, *args, **named)
os.open, shutil._use_fd_functions = opened, False
"""


def no_flock(number: int) -> str:
    """A file system without locks answers with this error."""
    return f"""
import fcntl, os
def flock(descriptor, operation):
    raise OSError({number}, os.strerror({number}))
fcntl.flock = flock
"""


def ocd_where(customize: str, folder: Folder, *args: str, code: int = 0) -> subprocess.CompletedProcess:
    """`ocd` on a project where this has been executed before; the exit code is asserted, and no traceback is shown."""
    place = folder.root / "customized"
    place.mkdir(exist_ok=True)
    (place / "sitecustomize.py").write_text(customize)
    environment = os.environ | {"PYTHONPATH": f"{place}{os.pathsep}{ROOT}"}
    words = [sys.executable, "-m", "ocd_cli", *args, *([] if "--help" in args else ["--device", "cpu"])]
    result = subprocess.run(words, cwd=folder.root, env=environment, capture_output=True, text=True)
    shown = f"{result.stdout}\n{result.stderr}"
    assert result.returncode == code, shown
    assert "Traceback" not in shown
    assert "a fault in ocd itself" not in shown
    return result
