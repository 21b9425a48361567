"""A process that is asked to end, a terminal that is closed, and output that nobody reads."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from imagelab.cli import Parser, report_errors
from imagelab.console import Console
from imagelab.training.interrupt import Interrupted, finish_step_on_interrupt

ROOT = Path(__file__).parents[2]
ENDINGS = [(signal.SIGTERM, 143), (signal.SIGHUP, 129)]


@pytest.fixture(autouse=True)
def as_a_shell_starts_it(interruptible, monkeypatch):
    """Nothing is ignored or handled, and this process is no part of a launch."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    former = {each: signal.signal(each, signal.SIG_DFL) for each, _ in ENDINGS}
    yield
    for each, handler in former.items():
        signal.signal(each, handler)


def command(work):
    with report_errors(Parser(prog="some.py")):
        work()


# ----------------------------------------------------------------------------------------------
# being asked to end


@pytest.mark.parametrize("signum, code", ENDINGS)
def test_a_command_that_is_asked_to_end_says_so(signum, code, fails):
    assert (
        fails(command, lambda: signal.raise_signal(signum), code=code).err == "some.py: stopped\n"
    )
    assert signal.getsignal(signum) is signal.SIG_DFL


def test_what_is_cleared_away_is_not_disturbed(fails):
    """systemd sends SIGHUP after SIGTERM."""
    cleared = []

    def work():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGTERM)
            cleared.append(True)

    fails(command, work, code=143)
    assert cleared == [True]


def test_a_command_of_nohup_goes_on(capsys):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def work():
        with finish_step_on_interrupt() as interrupt:
            signal.raise_signal(signal.SIGHUP)
            interrupt.raise_if_asked("nowhere")
        print("done")

    command(work)
    assert capsys.readouterr().out == "done\n"


def test_processes_of_a_launch_leave_it_to_their_launcher(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = []
    command(lambda: found.append(signal.getsignal(signal.SIGTERM)))
    with finish_step_on_interrupt():
        found.append(signal.getsignal(signal.SIGTERM))
    assert found == [signal.SIG_DFL, signal.SIG_DFL]


@pytest.mark.parametrize("signum, code", [*ENDINGS, (signal.SIGINT, 130)])
def test_a_step_is_finished_first(signum, code, fails):
    steps = []

    def work():
        with finish_step_on_interrupt() as interrupt:
            for step in range(3):
                signal.raise_signal(signum)
                steps.append(step)
                interrupt.raise_if_asked(f"after step {step}")

    assert fails(command, work, code=code).err.endswith("some.py: stopped after step 0\n")
    assert steps == [0]


def test_the_code_stays_that_of_the_signal_in_other_words(fails):
    def work():
        try:
            raise Interrupted("stopped after step 1", signal.SIGTERM)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("the same command goes on from here") from None

    told = fails(command, work, code=143).err
    assert told == "some.py: the same command goes on from here\n"


def test_after_one_signal_the_others_wait_for_the_step_but_ctrl_c_does_not():
    with finish_step_on_interrupt() as interrupt:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGHUP)
        with pytest.raises(KeyboardInterrupt) as stop:
            signal.raise_signal(signal.SIGINT)
    assert type(stop.value) is KeyboardInterrupt
    assert (interrupt.asked, interrupt.signum) == (True, signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_ctrl_c_that_is_ignored_stays_so(caplog):
    """As a shell's script has it of what it starts in the background."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with finish_step_on_interrupt() as interrupt:
        signal.raise_signal(signal.SIGINT)
        assert not interrupt.asked and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
    assert (interrupt.asked, interrupt.signum) == (True, signal.SIGTERM)
    assert caplog.messages == ["finishing this step"]
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


# ----------------------------------------------------------------------------------------------
# nobody reads, or not everything


def test_a_stream_without_a_reader_takes_everything():
    ear, mouth = os.pipe()
    os.close(ear)
    with open(mouth, "w") as stream:
        console = Console(stream)
        for _ in range(3):
            assert console.write("a line\n") == 7
            console.flush()
        assert console.fileno() == mouth


def test_what_an_encoding_does_not_know_is_an_escape():
    """Windows' own of Western Europe, of an output that goes to a file."""
    file = io.BytesIO()
    console = Console(io.TextIOWrapper(file, encoding="cp1252"))
    console.write("né <asset0> → 猫\n")
    console.write("Übung\n")
    console.flush()
    assert file.getvalue() == b"n\xe9 <asset0> \\u2192 \\u732b\n\xdcbung\n"


@pytest.mark.parametrize(
    "encoding, text, written",
    [
        ("cp1251", "n\xe9", b"n\\xe9"),
        ("cp437", "\xd7", b"\\xd7"),
        ("cp1252", "\u20ac \u2192", b"\x80 \\u2192"),
        ("ascii", "\x81", b"\\x81"),
    ],
)
def test_each_code_page_has_its_own_escapes(encoding, text, written):
    file = io.BytesIO()
    console = Console(io.TextIOWrapper(file, encoding=encoding))
    console.write(text)
    console.flush()
    assert file.getvalue() == written


PRINTS = """
import sys
from tqdm import tqdm
from imagelab.cli import Parser, report_errors
with report_errors(Parser(prog="some.py")):
    for _ in tqdm(range(3), mininterval=0):
        print("a line", flush=True)
    open(sys.argv[1], "w").write("done")
"""


@pytest.mark.parametrize("redirection", ["| true", "2>&1 | true", ">&- 2>&-", "> /dev/full 2>&1"])
def test_work_goes_on_though_nobody_reads(redirection, tmp_path):
    if "/dev/full" in redirection and not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    script, result = tmp_path / "prints.py", tmp_path / "done"
    script.write_text(PRINTS)
    line = f"(sleep 0.2; '{sys.executable}' '{script}' '{result}'; echo $? > code) {redirection}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["sh", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert result.read_text() == "done"
    assert (tmp_path / "code").read_text() == "0\n"
