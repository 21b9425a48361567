import pytest
from hurried import hurry, run


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    hurry(monkeypatch)


@pytest.fixture
def work(tmp_path):
    return tmp_path / "work"


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder of a comparison that nothing disturbed."""
    work = tmp_path_factory.mktemp("finished") / "work"
    with pytest.MonkeyPatch.context() as patch:
        hurry(patch)
        run(work)
    return work
