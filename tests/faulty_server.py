"""`python app.py` in which faults can be switched on and off: python tests/faulty_server.py, as tests/faults.py does.

Each file in the folder $FAULTS is a fault that lasts as long as the file is there:

    clock   its text is the number of seconds by which the system's clock has jumped
    oom     the device has no memory left for a step of the model
    dns     names cannot be resolved
"""

import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

FOLDER = Path(os.environ["FAULTS"])


def jump_clock() -> None:
    real = time.time

    def told() -> float:
        try:
            return real() + float((FOLDER / "clock").read_text())
        except (OSError, ValueError):
            return real()

    time.time = told


def break_resolver() -> None:
    real = socket.getaddrinfo

    def resolve(host: Any, *args: Any, **options: Any) -> Any:
        if (FOLDER / "dns").exists() and host not in ("127.0.0.1", "localhost"):
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return real(host, *args, **options)

    socket.getaddrinfo = resolve


def break_memory() -> None:
    import torch

    from pipeline.moondream.runner import ModelRunner

    for name in ("encode_images", "prefill_images", "decode"):
        real = getattr(ModelRunner, name)

        def run(*args: Any, real: Any = real) -> Any:
            if (FOLDER / "oom").exists():
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return real(*args)

        setattr(ModelRunner, name, run)


if __name__ == "__main__":
    jump_clock()  # before anything takes the function by its name
    break_resolver()
    break_memory()
    import logging

    from app import main

    code = main()
    logging.shutdown()
    os._exit(code)
