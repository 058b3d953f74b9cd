"""Going to the background and coming back, with all that was started."""

import os
import signal
import subprocess
import sys

from katapod.host.descendants import descendants
from katapod.host.priority import _may_come_back

CODE = """
import os, subprocess, threading, time
from katapod.host.descendants import descendants
from katapod.host.priority import leave_background, stay_in_background
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
    own = os.getpriority(os.PRIO_PROCESS, 0)  # whoever filled the pool: who takes a machine from it is another
    seen = [own, 10, 0] if _may_come_back() else [own, own, own]
    assert done.stdout.splitlines() == [str([nice] * 3) for nice in seen]


CHAIN = """
import os, time
for _ in range({length}):
    if os.fork():
        break
else:
    print(flush=True)
time.sleep(60)
"""


def test_a_chain_of_descendants_longer_than_the_stack_is_deep() -> None:
    length = 250
    command = [sys.executable, "-c", CHAIN.format(length=length)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        limit = sys.getrecursionlimit()
        sys.setrecursionlimit(200)  # in place of a chain of 1000
        try:
            found = list(descendants(process.pid))
        finally:
            sys.setrecursionlimit(limit)
            for pid in found:
                os.kill(pid, signal.SIGKILL)
    assert len(found) == length + 1
