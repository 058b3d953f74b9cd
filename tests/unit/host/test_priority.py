"""Going to the background and coming back, with all that was started."""

import subprocess
import sys

CODE = """
import os, subprocess, threading, time
from katapod.host.priority import descendants, leave_background, stay_in_background
child = subprocess.Popen(["sleep", "60"], start_new_session=True)
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
def nices():
    return [os.getpriority(os.PRIO_PROCESS, int(thread)) for pid in (os.getpid(), child.pid)
            for thread in os.listdir(f"/proc/{pid}/task")]
assert set(descendants(os.getpid())) == {os.getpid(), child.pid}
print(nices())
stay_in_background()
print(nices())
leave_background()
print(nices())
child.kill()
"""


def test_there_and_back() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines() == ["[0, 0, 0]", "[10, 10, 10]", "[0, 0, 0]"]
