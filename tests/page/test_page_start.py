"""Starting the page, and whom it answers."""

import asyncio
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from mifo_page import __main__ as app
from mifo_page.uploads import upload_folder

ROOT = Path(__file__).parents[2]
NEEDED = "the page needs gradio: pip install '.[app]'"


# ----------------------------------------------------------------------------------------------
# starting it


def test_help_needs_neither_gradio_nor_torch():
    code = """import sys
from mifo_page.__main__ import main
try:
    main(["--help"])
except SystemExit:
    print(*({"gradio", "torch", "PIL"} & set(sys.modules)), "at once")"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert told.stdout.endswith("\nat once\n"), told.stderr


def test_without_gradio_a_sentence_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit) as stop:
        app.main([])
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith(f"{NEEDED}\n")


def test_pictures_go_with_the_page_and_those_of_killed_pages_with_the_next_one(
    monkeypatch, tmp_path
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    others = {"mifo_page_backup", "of_another_program"}  # of the user's, and no page's
    for name in others:
        (tmp_path / name).mkdir()
        (tmp_path / name / "photo.jpg").write_bytes(b"")
    killed = killed_page(tmp_path)
    assert list(killed.iterdir())
    with upload_folder() as running:
        (running / "photo.jpg").write_bytes(b"")
        with upload_folder() as second:
            assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {
                running.name, second.name, *others,
            }  # fmt: skip
            assert list(running.iterdir())
    assert {path.name for path in tmp_path.iterdir()} == others
    assert all(list((tmp_path / name).iterdir()) for name in others)


def killed_page(folder: Path) -> Path:
    """What a page that was killed leaves in a folder of temporary files: its own, with a photo."""
    code = """from mifo_page.uploads import upload_folder
with upload_folder() as folder:
    (folder / "photo.jpg").touch()
    print(folder, flush=True)
    input()"""
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(folder)},
    ) as page:
        left = Path(page.stdout.readline().strip())
        page.kill()
        page.wait()
    assert left.parent == folder
    return left


@pytest.mark.parametrize("port", ["99999", "65536", "0", "-1", "many", "80.5"])
def test_what_is_no_port_is_told(fails, port):
    told = fails(app.main, [f"--port={port}"])
    assert told.err.endswith(f"'{port}' is no port; give a number from 1 to 65535\n")


@pytest.mark.parametrize("address", ["nonsense.invalid", "", "[::1", "a..b", "127.0.0.1:80"])
def test_what_is_no_address_is_told(fails, address):
    told = fails(app.main, [f"--listen={address}"])
    assert f"--listen {address!r} is no address; give one of this machine" in told.err


def test_an_address_of_another_machine_is_told(fails):
    told = fails(app.main, ["--listen", "203.0.113.7"])  # one for documents, of no machine
    assert "--listen 203.0.113.7: " in told.err and "give one of this machine" in told.err


def test_a_port_in_use_is_told(fails):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        told = fails(app.main, ["--port", str(port)])
        app.check_address("127.0.0.1", None)  # any other will do
    assert f"--port {port}: Address already in use; give another" in told.err


def test_a_port_is_left_free_for_the_page():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    for address in ("127.0.0.1", "localhost", "0.0.0.0"):
        app.check_address(address, port)
    socket.create_server(("127.0.0.1", port)).close()


# ----------------------------------------------------------------------------------------------
# whom it answers

LOCAL = {"127.0.0.1", "localhost", "[::1]"}


@pytest.mark.parametrize(
    ("address", "hosts"),
    [
        ("127.0.0.1", LOCAL),
        ("localhost", LOCAL),
        ("::1", LOCAL),
        ("[::1]", LOCAL),
        ("192.168.1.5", {"192.168.1.5"}),
        ("Lab.example", {"lab.example"}),
        ("fe80::1", {"[fe80::1]"}),
    ],
)
def test_a_page_answers_to_the_names_of_its_address(address, hosts):
    assert app.hosts_of(address) == hosts


def guarded(hosts, **headers) -> int:
    """The status that a request with these headers gets; 200 where it reaches the page."""
    told = []

    async def page(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message):
        told.append(message)

    pairs = [(key.replace("_", "-").encode(), value.encode()) for key, value in headers.items()]
    scope = {"type": "http", "path": "/", "headers": pairs}
    asyncio.run(app.Guard(page, hosts)(scope, None, send))
    return told[0]["status"]


@pytest.mark.parametrize("name", sorted(LOCAL))
def test_the_guard_knows_a_name_with_and_without_a_port(name):
    for host in (name, f"{name}:7860"):
        assert guarded(LOCAL, host=host) == 200
        assert guarded(LOCAL, host=host, origin=f"http://{host}") == 200
        for origin in ("http://evil.example", "null", "", "http://[", "http://[::1", host):
            assert guarded(LOCAL, host=host, origin=origin) == 403


@pytest.mark.parametrize(
    "host",
    ["", "evil.example", "evil.example:7860", "::1", "localhost:80:7860", "1.2.3.4.evil.example"],
)
def test_the_guard_refuses_other_names(host):
    for address in ("127.0.0.1", "0.0.0.0", "::"):
        assert guarded(app.hosts_of(address), host=host) == 403


@pytest.mark.parametrize("host", ["192.168.1.7:7860", "[::2]:7860", "[::2]"])
def test_a_page_on_every_address_answers_to_all_in_digits(host):
    assert guarded(app.hosts_of("0.0.0.0"), host=host) == 200
    assert guarded(app.hosts_of("127.0.0.1"), host=host) == 403


def test_a_page_on_every_address_answers_to_the_machine_s_name(monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "Studio")
    assert guarded(app.hosts_of("::"), host="studio:7860") == 200
    assert guarded(app.hosts_of("127.0.0.1"), host="studio:7860") == 403


def test_the_guard_refuses_what_is_too_large():
    limit = 32 * 2**20 * 4 // 3
    assert guarded(LOCAL, host="localhost", content_length=str(limit)) == 200
    assert guarded(LOCAL, host="localhost", content_length=str(limit + 1)) == 413
    assert guarded(LOCAL, host="evil.example", content_length=str(limit + 1)) == 403
    assert guarded(LOCAL, host="localhost", transfer_encoding="chunked") == 411
