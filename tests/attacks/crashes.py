"""Commands that are killed (kill -9) or lose power, at any moment: nothing is lost or half done.

    python tests/attacks/crashes.py --count 50           # about ten minutes
    python tests/attacks/crashes.py --count 50 --strace  # power: calls as the system sees them

What was finished is whole afterwards, as it was or as it will be; the same command again (a
learning run with --resume) ends as one that nothing broke, bit by bit; nothing else is left.
Prints how many there were of each end, and each one that breaks this. Moments of kill -9 are
random, two of three after the first file that the command finishes, a checkpoint for example;
those of a loss of power are all that there are, see power_loss.py.
"""

import argparse
import itertools
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "lora-master"), str(ROOT / "tests")]
os.environ.setdefault("OMP_NUM_THREADS", "1")  # who has worked on several threads cannot fork
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import power_loss  # noqa: E402
import traced  # noqa: E402
from crash_commands import COMMANDS, OUT, Command, need  # noqa: E402
from thin import contents  # noqa: E402

DAYS = 3 * 86400  # seconds: asides that are older belong to nobody


def prepare(work: Path, names: Sequence[str]) -> None:
    """What commands need: a model of few layers, a photo, a learned folder, and what is before."""
    from fuzz import prepare as prepare_inputs
    from tqdm import tqdm

    import imagelab.figures
    import mifo.learning.priors

    for name in ("plot_losses", "plot_attention"):  # which would take most of the time, as would
        setattr(imagelab.figures, name, lambda path, *args: path.touch())
    mifo.learning.priors.STEPS = 4  # steps of class images
    tqdm.set_lock(threading.RLock())  # its own is shared with forks: a killed one would keep it
    os.chdir(work)
    prepare_inputs(work)  # learns with another seed
    (work / "here").mkdir()
    os.chdir(work / "here")
    for name in names:
        COMMANDS[name].prepare(work)


# ----------------------------------------------------------------------------------------------
# running


def start(work: Callable[[], None]) -> int:
    """Do something in a fork; its number. What it tells goes to the file ``told``."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        told = os.open("told", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(told, 1)
        os.dup2(told, 2)
        work()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait(child: int) -> int:
    """The exit code of a fork, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(command: Command, argv: Sequence[str]) -> None:
    """Run a command to its end; raises Broken unless it ends well."""
    code = wait(start(lambda: command.main(argv)))
    told = Path("told").read_text()[-1500:] if code else ""
    need(code == 0, f"exit code {code} of {' '.join(argv)}\n{told}")


def age(folder: Path) -> None:
    """Make the hidden asides in a folder as old as those that belong to nobody."""
    then = time.time() - DAYS
    for path in folder.rglob(".*.part"):
        os.utime(path, (then, then))


def go_on(command: Command) -> None:
    """Run a command again after a crash; raises Broken unless it ends as one that nothing broke."""
    age(OUT)
    run(command, command.again())
    command.check_end()


def spent(child: int) -> float:
    """Seconds that a fork has computed, which do not depend on what else the machine does."""
    try:
        return time.clock_gettime(~child << 3 | 2)  # the clock of a process, on Linux
    except OSError:
        return time.monotonic()


def is_over(child: int) -> bool:
    """Whether a fork has ended."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def measure(command: Command) -> tuple[float, float]:
    """Run a command unbroken: seconds to its first file, and from there to its end."""
    command.enter("unbroken")
    command.before = contents(OUT) if OUT.exists() else {}
    child = start(lambda: command.main(command.argv))
    begun = first = last = spent(child)
    while not is_over(child):
        last = spent(child)
        if first == begun and command.first():
            first = last
        time.sleep(0.002)
    need(wait(child) == 0, f"an unbroken run fails:\n{Path('told').read_text()[-1500:]}")
    command.whole = contents(OUT)
    command.check_end()
    return first - begun, last - first


def kill_once(command: Command, rng: random.Random, late: int, seconds: tuple[float, float]) -> str:
    """Kill a command at a random moment, and run it again.

    late: 1: after its first file; 2: in the second half of what follows.
    """
    child = start(lambda: command.main(command.argv))
    begun = spent(child)
    while late and not is_over(child) and not command.first():
        time.sleep(0.0005)
    if late:
        begun = spent(child)
    delay = rng.uniform((late == 2) / 2, 1) * (seconds[1] if late else sum(seconds))
    while not is_over(child) and spent(child) - begun < delay:
        time.sleep(0.0005)
    os.kill(child, signal.SIGKILL)
    killed = wait(child) == -signal.SIGKILL
    end = command.check()
    go_on(command)
    return f"killed at {end}" if killed else "ended before"


def kills(command: Command, count: int, rng: random.Random) -> tuple[Counter, list]:
    """Kill a command so many times; counts of ends, and what was broken."""
    counts, broken = Counter(), []
    seconds = measure(command)
    print(f"  {seconds[0]:.2f} s to the first file, {seconds[1]:.2f} s to the end", flush=True)
    for number in range(count):
        command.enter(f"kill{number}")
        try:
            counts[kill_once(command, rng, number % 3, seconds)] += 1
        except Exception as error:
            counts["BROKEN"] += 1
            broken.append(f"kill {number}: {error!r}".replace("\\n", "\n"))
            print(broken[-1], flush=True)
        else:
            shutil.rmtree(command.folder(f"kill{number}"))
    return counts, broken


# ----------------------------------------------------------------------------------------------
# power


def record(command: Command) -> tuple[int, list[power_loss.Call]]:
    """The calls of an unbroken run, recorded in its process, and how many tell what was before."""
    command.enter("recorded")
    OUT.mkdir(exist_ok=True)

    def work() -> None:
        with power_loss.Recorder(OUT).watching() as recorder:
            command.main(command.argv)
        Path("calls").write_bytes(pickle.dumps((recorder.given, recorder.calls)))

    code = wait(start(work))
    need(code == 0, Path("told").read_text()[-1500:])
    return pickle.loads(Path("calls").read_bytes())


def trace(command: Command) -> tuple[int, list[power_loss.Call]]:
    """The same, recorded by strace."""
    command.enter("traced")
    OUT.mkdir(exist_ok=True)
    before = power_loss.Recorder(OUT)
    there, go = os.pipe()

    def work() -> None:
        os.read(there, 1)
        command.main(command.argv)

    child = start(work)
    log = Path("strace")
    with traced.attach(child, log) as tracer:
        os.write(go, b"!")
        code = wait(child)
        tracer.stderr.read()
    need(code == 0, Path("told").read_text()[-1500:])
    return before.given, traced.read(log, OUT, before)


class Replay:
    """A loss of power at every moment of a run: what it leaves, checked, each disk once.

    ends: the end of each disk, by the disk; counts: of ends; broken: a text for each fault.
    """

    def __init__(self, command: Command):
        self.command = command
        self.counts, self.broken = Counter(), []
        self.ends: dict[tuple, str] = {}
        self.folders: dict[str, list[Path]] = {}  # of whole disks, by their end

    def run(self, given: int, calls: Sequence[power_loss.Call]) -> None:
        """Check all disks. What was safe at one moment has to be safe at every later one."""
        order: list[str] = []  # of ends, as they come where nothing is lost
        safe = 0
        for count, trees in power_loss.states(calls):
            if count < given:
                continue
            self.counts["moments"] += 1
            ends = [self.check(tree, count) for tree in trees]  # the first of them lost nothing
            if ends[0] not in order:
                order.append(ends[0])
            least = min(order.index(end) for end in ends if end in order)
            if least < safe:
                what = f"{order[safe]} was safe and {order[least]} is left"
                self.fault(f"power lost after call {count}", what)
            safe = max(safe, least)

    def check(self, tree: power_loss.Tree, count: int) -> str:
        """How far the run came on a disk."""
        key = tuple(sorted(tree.items()))
        if key not in self.ends:
            folder = self.command.folder(f"disk{len(self.ends)}")
            power_loss.lay_out(tree, folder / OUT)
            os.chdir(folder)
            try:
                self.ends[key] = self.command.check()
                self.folders.setdefault(self.ends[key], []).append(folder)
            except Exception as error:
                self.ends[key] = "BROKEN"
                self.fault(f"power lost after call {count}, {folder.name}", repr(error))
            else:
                self.counts[self.ends[key]] += 1
        return self.ends[key]

    def go_on(self, count: int, rng: random.Random) -> None:
        """Run the command again on so many disks, of as many ends as there are."""
        for folders in self.folders.values():
            rng.shuffle(folders)
        turns = itertools.zip_longest(*self.folders.values())
        chosen = [folder for turn in turns for folder in turn if folder][:count]
        for folder in chosen:
            os.chdir(folder)
            try:
                go_on(self.command)
                self.counts["gone on with"] += 1
            except Exception as error:
                self.fault(f"{folder.name}, gone on with", repr(error))

    def fault(self, when: str, what: str) -> None:
        """Count a fault, and print each kind of them once."""
        self.counts["BROKEN"] += 1
        if what not in self.broken:
            self.broken.append(what)
            print(f"{when}: {what}"[:2000].replace("\\n", "\n"), flush=True)


def lose_power(
    command: Command, recording: Callable, resumed: int, rng: random.Random
) -> tuple[Counter, list]:
    """Replay a run; counts of ends, and what was broken."""
    replay = Replay(command)
    replay.run(*recording(command))
    replay.go_on(resumed, rng)
    replay.counts["disks"] = len(replay.ends)
    return replay.counts, replay.broken


# ----------------------------------------------------------------------------------------------


def crash(work: Path, recording: Callable, options: argparse.Namespace) -> list[str]:
    """Kill each command, lose its power, and print counts; what was broken."""
    broken = []
    prepare(work, options.commands)
    for index, name in enumerate(options.commands):
        rng = random.Random(f"{options.seed} {name}")
        command = COMMANDS[name](work)
        mine = len(range(index, options.count, len(options.commands)))
        for what, act in (
            ("kill -9", lambda c, r, n=mine: kills(c, n, r)),
            ("power", lambda c, r: lose_power(c, recording, options.resumed, r)),
        ):
            print(f"{name}, {what}:", flush=True)
            counts, found = act(command, rng)
            print(f"  {dict(counts)}", flush=True)
            broken += [f"{name}, {what}: {text}" for text in found]
    return broken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=50, help="of kills, over all commands")
    parser.add_argument("--resumed", type=int, default=10, help="disks of each that go on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--strace", action="store_true", help="record calls by strace")
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    options = parser.parse_args()
    recording = record
    if options.strace:
        if reason := traced.is_possible():
            print(f"power: skipped the recording by strace, since {reason}; it is done in Python")
        else:
            recording = trace
    here = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="crash_") as work:
        try:
            broken = crash(Path(work), recording, options)
        finally:
            os.chdir(here)
    print(f"{len(broken)} broken")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
