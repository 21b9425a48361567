"""A page to draw on: mask the things in a photo, learn them, paint each inside its box.

It serves on this machine alone unless --listen names another address, reads and writes in the
chosen folders alone, and shows every command that it runs.
"""

import argparse
import errno
import logging
import os
import re
import signal
import socket
import sys
import threading
from dataclasses import fields
from ipaddress import ip_address
from pathlib import Path

from imagelab.cli import HelpFormatter, Parser, add_setting, report_errors
from imagelab.errors import UserError
from mifo.learning.config import LearningConfig
from mifo.synthesis.config import SynthesisConfig
from mifo_page import MAX_FILE, MAX_SENT, MIGE_MODEL
from mifo_page.uploads import upload_folder

LOCAL = "127.0.0.1"
ANY_NUMBER = "0.0.0.0"  # in a set of hosts: every address in digits
#: The browser may use what this page serves, and nothing from elsewhere.
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' blob: data:; frame-ancestors 'none'"
#: Files that the browser shows; any other, which could run a script here, it downloads.
SHOWN = (b"image/png", b"image/jpeg", b"image/webp")


def parse_args(argv: list[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = Parser(prog="python -m mifo_page", description=__doc__, formatter_class=HelpFormatter)
    learning, synthesis = LearningConfig(), SynthesisConfig()
    add_setting(parser, learning, "folder_path", "folder of the instance folders")
    add_setting(parser, synthesis, "models_dir", "folder of the learned folders")
    add_setting(parser, synthesis, "output_path", "where the folders of pictures go")
    add_setting(
        parser, learning, "model_path", "diffusers folder, .safetensors file, hub id, or toybox"
    )
    parser.add_argument("--mige_model", default=MIGE_MODEL, help="model folder of MIGE, or toybox")
    add_setting(parser, learning, "device", "auto (cuda > mps > cpu), cuda, mps or cpu")
    parser.add_argument("--offline", action="store_true", help="never ask the hub for anything")
    parser.add_argument(
        "--listen",
        default=LOCAL,
        metavar="ADDRESS",
        help="serve on this address, such as 0.0.0.0: whoever reaches it can use the page",
    )
    parser.add_argument("--port", type=port_option, help="None: the first free one from 7860 on")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    return parser, parser.parse_args(argv)


def port_option(text: str) -> int:
    """A port from an option's text."""
    try:
        port = int(text)
    except ValueError:
        port = 0
    if not 1 <= port < 2**16:
        raise argparse.ArgumentTypeError(f"{text!r} is no port; give a number from 1 to 65535")
    return port


def check_address(address: str, port: int | None) -> None:
    """Raises UserError unless this machine can serve on an address, and on a port if it is given.

    gradio takes minutes to find that out, or fails with a traceback.
    """
    advice = f"give one of this machine, such as {LOCAL}, or 0.0.0.0 for all of them"
    host = address[1:-1] if address.startswith("[") and address.endswith("]") else address
    try:
        found = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM) if host else []
    except (OSError, UnicodeError):
        found = []
    if not found:
        raise UserError(f"--listen {address!r} is no address; {advice}")
    for family, kind, _, _, where in found:
        try:
            with socket.socket(family, kind) as trial:
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                trial.bind(where)
            return
        except OSError as error:
            failure = error
    if port and failure.errno in (errno.EADDRINUSE, errno.EACCES):
        raise UserError(f"--port {port}: {failure.strerror}; give another") from failure
    raise UserError(f"--listen {address}: {failure.strerror}; {advice}") from failure


def in_url(address: str) -> str:
    """An address as URLs write it: that of IPv6 in brackets."""
    return f"[{address}]" if ":" in address and not address.startswith("[") else address


def hosts_of(address: str) -> set[str]:
    """The names that a page served on an address answers to, as URLs write them, or ANY_NUMBER."""
    host, local = in_url(address).lower(), {LOCAL, "localhost", "[::1]"}
    if host in ("0.0.0.0", "[::]"):  # every address of this machine
        return local | {ANY_NUMBER, socket.gethostname().lower(), socket.getfqdn().lower()}
    return local if host in local else {host}


def is_number(host: str) -> bool:
    """Is this an address in digits, in brackets if it is one of IPv6?"""
    try:
        return in_url(str(ip_address(host.strip("[]")))) == host
    except ValueError:
        return False


class Guard:
    """Serves requests to this host from this page, with POLICY; refuses all others.

    So no other page in the browser can use this one, not even under a name that somebody made lead
    to this machine. ``hosts`` are the names that this page answers to; with ANY_NUMBER among them
    it answers to every address in digits, since nobody can make that lead elsewhere. A request
    that is larger than MAX_SENT, or does not say how large it is, is refused unread.
    """

    def __init__(self, app, hosts: set[str]):
        self.app, self.hosts = app, hosts

    def knows(self, host: str) -> bool:
        """Whether a request to this host, with its port, is for this page."""
        name = re.sub(r":\d+$", "", host).lower()
        return name in self.hosts or (ANY_NUMBER in self.hosts and is_number(name))

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        headers = {key: value.decode("latin-1") for key, value in scope["headers"]}
        host, origin = headers.get(b"host", ""), headers.get(b"origin")
        if not self.knows(host) or (origin is not None and origin.partition("://")[2] != host):
            await refuse(send, 403, b"not asked from this page\n")
            return
        if b"transfer-encoding" in headers:
            await refuse(send, 411, b"say how large this is\n")
            return
        if int(headers.get(b"content-length", 0)) > MAX_SENT:
            await refuse(send, 413, b"this is too large\n")
            return

        async def send_with_policy(message) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", POLICY.encode())
                message = {**message, "headers": [*message["headers"], policy]}
                if "/file=" in scope["path"] or "/file/" in scope["path"]:
                    message["headers"] = as_download(message["headers"])
            await send(message)

        await self.app(scope, receive, send_with_policy)


def as_download(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The headers of a file, which make the browser keep it unless it is one to show."""
    if dict(headers).get(b"content-type") in SHOWN:
        return headers
    others = [header for header in headers if header[0] != b"content-disposition"]
    return [*others, (b"content-disposition", b"attachment")]


async def refuse(send, status: int, reason: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": reason})


def serve(options: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C or SIGTERM; a running command is stopped then, and saves."""
    from starlette.middleware import Middleware

    from imagelab.io.folders import check_writable
    from mifo_page.job import Job
    from mifo_page.page import CSS, build_page, theme
    from mifo_page.places import Places

    logging.getLogger("httpx").setLevel(logging.WARNING)
    for name in ("folder_path", "models_dir", "output_path"):
        check_writable(Path(getattr(options, name)), name)
    places = Places(**{field.name: getattr(options, field.name) for field in fields(Places)})
    job, hosts = Job(), hosts_of(options.listen)
    page = build_page(places, job)
    try:
        _, address, _ = page.launch(
            server_name=in_url(options.listen),
            server_port=options.port,
            allowed_paths=[str(Path(options.output_path).resolve())],
            max_file_size=MAX_FILE,
            app_kwargs={"middleware": [Middleware(Guard, hosts)]},
            state_session_capacity=16,
            share=False,
            ssr_mode=False,
            mcp_server=False,
            enable_monitoring=False,
            show_error=True,
            quiet=True,
            prevent_thread_lock=True,
            theme=theme(),
            css=CSS,
        )
        print(f"open {address} (Ctrl-C ends)", flush=True)
        if hosts_of(LOCAL) != hosts:
            print(f"whoever reaches {options.listen} can use the page: it has no password")
        threading.Event().wait()
    finally:
        job.close()
        page.close()


def main(argv: list[str] | None = None) -> None:
    parser, options = parse_args(argv)
    with report_errors(parser, options.debug), upload_folder() as uploads:
        check_address(options.listen, options.port)
        os.environ["GRADIO_TEMP_DIR"] = str(uploads)
        os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
        try:
            import gradio  # noqa: F401
        except ModuleNotFoundError as error:
            raise UserError("the page needs gradio: pip install '.[app]'") from error
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        # A background job of a script inherits that Ctrl-C is ignored, and so would its commands.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        serve(options)


if __name__ == "__main__":
    main()
