"""What tests do with the page in a browser."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
CHROMIUM = "/usr/bin/chromium"
NEEDED = "the page needs gradio: pip install '.[app]'"


def value_of(page, name) -> str:
    return page.locator(f"#{name} textarea, #{name} input").first.input_value()


def wait_until(page, name, text):
    """Wait until a field of the page holds a text."""
    script = """([name, text]) => document.querySelector(`#${name} textarea, #${name} input`)
        .value.includes(text)"""
    page.wait_for_function(script, arg=[name, text])


def fill(page, name, text):
    page.locator(f"#{name} textarea, #{name} input").first.fill(text)


def shoot(page, name):
    """A screenshot to look at, where MIFO_SCREENSHOTS names a folder."""
    if folder := os.environ.get("MIFO_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)
