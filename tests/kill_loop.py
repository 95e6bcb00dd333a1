"""A server that is killed again and again: `python -m tests.kill_loop --runs 200` takes about 15 minutes.

`kill -9` hits a real server (python app.py, the demo model) at random moments: while it starts, loads the model,
downloads, describes, stores, compacts its journal. Each time it is started on the same data. All along, clients upload,
submit URLs, read, cancel, retry and delete; half of their submits have an Idempotency-Key, with which they go on after
a broken connection. Then the server is left alone until all is done, and Audit holds what it has against what it
acknowledged, against what clients have read, and against the results of a server that nobody disturbed.

Two deaths over the same frame, alone in the model, or three starts that stored no frame: then the server blames the
video (jobs/job_run.py), and rightly. Random kills would bring that about 0 to 4 times in 60 runs. So a kill that could
looks first: it stops the process, reads what is on the disk, and if the next start would blame the video, lets it go on
for a moment, and looks again. That makes the chance 0, and spares no other moment. "spared" counts these kills.

Prints a line now and then, and JSON as its last. Exit 0 only if all from "lost" to "wrong" are 0; else the data
directory is kept and named. The same --seed draws the same moments and requests, but threads take their own time.
The clients are in kill_clients.py, what has to hold is in kill_audit.py. In pytest: tests/test_kill_loop.py
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # as pytest does

from kill_audit import BAD, Audit, all_jobs, attempts, by_frame, condemns, records  # noqa: E402
from kill_clients import CLIPS, KEY, KINDS, Client, Job, make_clips, serve_slowly  # noqa: E402
from local_server import LocalServer  # noqa: E402
from serving import ServerProcess, wait_until  # noqa: E402

from jobs.journal import Change, decode, encode, lines  # noqa: E402
from jobs.store import COMPACT_EXTRA_LINES  # noqa: E402

NUM_CLIENTS = 2
EARLY_SHARE, EARLY_S = 0.25, (0.1, 3.0)  # of the kills: those counted from the start of the process
# The others come after the model is loaded, which takes a quiet machine 2.4 s; at most so many times later.
MAX_LATE, MAX_READY_S = 1.7, 12.0
FILL_EVERY = 6  # runs: then the journal is due for a compaction


# Killing


class Victim(ServerProcess):
    """start() does not wait for an answer: clients, and the kill, come at any time."""

    def start(self, *, is_ready: bool = True) -> ServerProcess:
        self._num_log_bytes = self.log.stat().st_size if self.log.exists() else 0  # of the starts before
        return super().start(is_ready=is_ready)

    def is_ready(self) -> bool:
        return super()._answers("ready")

    def is_working(self) -> bool:
        """Whether the model is loaded, as the log tells: asking costs more."""
        with self.log.open("rb") as log:
            log.seek(self._num_log_bytes)
            return b" Ready: " in log.read()

    def _answers(self, path: str) -> bool:
        return True


@dataclass
class Loop:
    """Kills, and what is known of them."""

    server: Victim
    folder: Path
    rng: random.Random
    num_spared: int = 0
    situations: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def run(self, number: int) -> None:
        """Start the server, and kill it at some moment."""
        is_filled = number % FILL_EVERY == 0 and fill(self.folder, self.rng)
        is_risky = any(condemns(attempt, 1) for attempt in attempts(self.folder))
        part = self.folder / "jobs.jsonl.part"
        before = changed_at_ns(part)  # one may be left over from an earlier kill
        self.server.start()
        if is_filled:
            self._wait(lambda: changed_at_ns(part) not in (None, before), 0.0001)  # it takes about a millisecond
            time.sleep(self.rng.uniform(0, 0.001))
        elif self.rng.random() < EARLY_SHARE:
            time.sleep(self.rng.uniform(*EARLY_S))
        else:
            ready_s = self._wait(self.server.is_working, 0.02)
            time.sleep(self.rng.uniform(0, MAX_LATE * ready_s))
        if is_risky:
            self._wait_for_a_fair_moment()
        process = self.server.process
        assert process
        if process.poll() is not None:
            self.wrong.append(f"run {number}: the server ended by itself, with {process.returncode}")
        self.server.kill()
        is_compacting = changed_at_ns(part) not in (None, before)
        self.situations["compacting" if is_compacting else situation(self.folder)] += 1

    def _wait(self, has_come: Callable[[], bool], pause_s: float) -> float:
        """Wait, but not longer than MAX_READY_S. -> seconds"""
        started_s = time.monotonic()
        while (waited_s := time.monotonic() - started_s) < MAX_READY_S and not has_come():
            time.sleep(pause_s)
        return waited_s

    def _wait_for_a_fair_moment(self) -> None:
        """Stop the process where a kill cannot be mistaken for the video's fault."""
        process, was_spared = self.server.process, False
        assert process
        while process.poll() is None:
            process.send_signal(signal.SIGSTOP)
            os.waitpid(process.pid, os.WUNTRACED)
            if not any(condemns(attempt, 0) for attempt in attempts(self.folder)):
                break
            was_spared = True
            process.send_signal(signal.SIGCONT)
            time.sleep(self.rng.uniform(0.005, 0.05))
        self.num_spared += was_spared


def fill(folder: Path, rng: random.Random) -> bool:
    """Repeat a line of the journal until it is due for a compaction within a few more. -> whether it was possible"""
    path, known = folder / "jobs.jsonl", records(folder)
    written = list(lines(path)) if path.exists() else []
    if not known or decode(written[-1]) is None:
        return False
    job_id, record = next(iter(known.items()))
    num_lines = 2 * len(known) + COMPACT_EXTRA_LINES - len(written) - rng.randrange(20)
    with path.open("ab") as file:
        file.write(encode(Change("jobs", {job_id: record})) * num_lines)
    return True


def changed_at_ns(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def situation(folder: Path) -> str:
    """What the killed server was at."""
    stages = {record["stage"] or "claiming" for record in records(folder).values() if record["status"] == "processing"}
    return " and ".join(sorted(stages)) or "nothing"


# From the first run to the last look


def undisturbed(server: Victim, client: Client) -> dict[str, list[dict[str, Any]]]:
    """Describe a video for each kind of request. -> the frame results"""
    server.start()
    wait_until(server.is_ready)
    jobs = [Job(number, name, None, []) for number, name in enumerate(KINDS)]
    for job in jobs:
        client.submit(job)

    def are_finished() -> bool:
        for job in jobs:
            client.look(job)
        return all(job.is_finished for job in jobs)

    wait_until(are_finished, 300, 0.1)
    server.stop()
    assert all(job.may_end == {"completed"} and job.seen for job in jobs) and not client.wrong, client.wrong
    return {job.kind: by_frame(job.seen) for job in jobs}


def kill_loop(num_runs: int, seed: int, folder: Path) -> int:
    """-> exit code"""
    started_s = time.monotonic()
    make_clips(folder)
    settings = {"allow_private_urls": "127.0.0.1", "api_keys": KEY, "rate_limit_per_minute": 100_000, "slots": 4}
    with ExitStack() as stack:
        web = LocalServer()
        stack.callback(web.stop)
        for name in CLIPS:
            serve_slowly(web, folder / name)
        quiet, victim = (Victim(folder / name, **settings) for name in ("undisturbed", "data"))
        for server in (quiet, victim):
            stack.enter_context(server)
        clients = [Client(i, victim if i else quiet, folder, web.port, seed) for i in range(1 + NUM_CLIENTS)]
        for client in clients:
            stack.callback(client.close)
        expected = undisturbed(quiet, clients[0])
        loop = Loop(victim, folder / "data", random.Random(seed))
        run_all(loop, clients[1:], num_runs)
        found = finish(loop, clients[1:], expected)
    print(json.dumps({"runs": num_runs, **found, "seconds": round(time.monotonic() - started_s)}), flush=True)
    return 1 if any(found[name] for name in BAD) else 0


def run_all(loop: Loop, clients: list[Client], num_runs: int) -> None:
    for client in clients:
        client.start()
    for number in range(1, num_runs + 1):
        loop.run(number)
        if number % 10 == 0:
            num_jobs = sum(job.job_id is not None for client in clients for job in client.jobs)
            kills = ", ".join(f"{number} {what}" for what, number in loop.situations.most_common())
            print(f"{number} runs, {num_jobs} jobs acknowledged; killed at: {kills}", flush=True)
    for client in clients:
        client.is_to_end.set()
        client.join()


def finish(loop: Loop, clients: list[Client], expected: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Let the server work until all is done, and look. -> the figures"""
    server = loop.server
    server.start()
    wait_until(server.is_ready)
    jobs = [job for client in clients for job in client.jobs]
    with server.client(headers={"Authorization": f"Bearer {KEY}"}) as http:
        for client in clients:
            client.settle()
        wait_until(lambda: not (all_jobs(http, "submitted") or all_jobs(http, "processing")), 600, 0.2)
        audit = Audit(http, expected)
        audit.check_jobs(jobs)
        job_ids = {summary["job_id"] for summary in all_jobs(http)}
    if (code := server.stop()) != 0:
        loop.wrong.append(f"the server ended with {code} when it was asked to stop")
    audit.check_disk(loop.folder, job_ids)
    log = server.log.read_text(encoding="utf-8").splitlines()
    wrong = [*loop.wrong, *(text for client in clients for text in client.wrong)]
    for text in [*wrong, *(line for line in log if " ERROR " in line or " CRITICAL " in line or "Traceback" in line)]:
        audit.complain("wrong", text)
    counts = sum((client.counts for client in clients), Counter[str]())
    return {
        "acknowledged": sum(job.job_id is not None for job in jobs),
        "frames": audit.counts["frames"],
        **{name: audit.counts[name] for name in BAD},
        **counts,
        "spared": loop.num_spared,
        "killed_at": dict(loop.situations),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kill_loop", description=__doc__)
    parser.add_argument("--runs", type=int, default=200, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="(default: %(default)s)")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the server: torch's threads would wait for each other's core
    folder = Path(tempfile.mkdtemp(prefix="moonreel-kill-"))
    code = kill_loop(args.runs, args.seed, folder)
    if code:
        print(f"Kept: {folder}", file=sys.stderr)
    else:
        shutil.rmtree(folder)
    return code


if __name__ == "__main__":
    sys.exit(main())
