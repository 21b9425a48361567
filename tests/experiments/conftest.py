import shutil

import pytest
from hurried import EXAMPLES, hurry, run, run_plain


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    hurry(monkeypatch)


@pytest.fixture
def work(tmp_path):
    return tmp_path / "work"


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder of a comparison that nothing disturbed; tests only read it."""
    work = tmp_path_factory.mktemp("finished") / "work"
    with pytest.MonkeyPatch.context() as patch:
        hurry(patch)
        run(work)
    return work


@pytest.fixture
def copied(finished, work):
    """A copy of it without the rows: all is learned, nothing is painted."""
    shutil.copytree(finished, work, ignore=shutil.ignore_patterns("rows.jsonl", "pictures"))
    return work


@pytest.fixture(scope="session")
def plain_finished(tmp_path_factory):
    """The folder of plain commands that nothing disturbed; tests only read it."""
    work = tmp_path_factory.mktemp("plain") / "work"
    shutil.copytree(EXAMPLES / "toy_car", work / "folders/toy_car")
    with pytest.MonkeyPatch.context() as patch:
        hurry(patch)
        run_plain(work)
    return work
