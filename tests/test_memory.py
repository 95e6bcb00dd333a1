"""How many heaps the C library keeps, told by itself: in a process of its own, as heaps stay."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
COUNT = """
import ctypes, sys, threading
from jobs.memory import bound_arenas
if sys.argv[1] == "bounded":
    bound_arenas()
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.fopen.restype = ctypes.c_void_p
libc.malloc_info.argtypes, libc.fclose.argtypes = (ctypes.c_int, ctypes.c_void_p), (ctypes.c_void_p,)
together = threading.Barrier(12)
def take():
    together.wait()
    libc.malloc(1000)
    together.wait()
threads = [threading.Thread(target=take) for _ in range(12)]
for thread in threads: thread.start()
for thread in threads: thread.join()
file = libc.fopen(sys.argv[2].encode(), b"w")
libc.malloc_info(0, file)
libc.fclose(file)
"""


def test_threads_share_two_heaps(tmp_path: Path) -> None:
    def num_heaps(how: str) -> int:
        told = tmp_path / how
        subprocess.run([sys.executable, "-c", COUNT, how, str(told)], cwd=ROOT, check=True)
        return told.read_text().count("<heap nr=")

    assert num_heaps("free") > 4
    assert num_heaps("bounded") == 2
