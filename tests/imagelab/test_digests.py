"""Digests of weights: what they are of, and when a kept one serves."""

import hashlib
import os

import pytest

from imagelab.models import digests
from imagelab.models.digests import weights_digest


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """Two small files, as if they were large; digests are kept in tmp_path/cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "LARGE", 1)
    files = {"vae": tmp_path / "v", "unet": tmp_path / "u"}
    for part, path in files.items():
        path.write_bytes(part.encode() * 3)
    return files


def by_hand(weights):
    parts = [part.encode() + weights[part].read_bytes() for part in ("unet", "vae")]
    return hashlib.sha256(b"".join(parts)).hexdigest()


@pytest.fixture
def hashed(monkeypatch):
    """How often files were really hashed."""
    calls, digest = [], digests._digest

    def counted(weights):
        calls.append(1)
        return digest(weights)

    monkeypatch.setattr(digests, "_digest", counted)
    return calls


def test_a_kept_digest_serves_while_the_files_stay(weights, hashed):
    assert weights_digest(weights) == weights_digest(weights) == by_hand(weights)
    assert len(hashed) == 1
    weights["vae"].write_bytes(b"other weights")  # of another size
    assert weights_digest(weights) == by_hand(weights)
    assert len(hashed) == 2


def test_another_time_or_file_is_hashed_anew(weights, hashed, tmp_path):
    weights_digest(weights)
    os.utime(weights["vae"], ns=(1, 1))
    weights_digest(weights)
    (tmp_path / "w").write_bytes(weights["vae"].read_bytes())
    os.utime(tmp_path / "w", ns=(1, 1))
    os.replace(tmp_path / "w", weights["vae"])  # the same path, size and time
    assert weights_digest(weights) == by_hand(weights)
    assert len(hashed) == 3


def test_small_files_are_always_hashed(weights, hashed, monkeypatch, tmp_path):
    monkeypatch.setattr(digests, "LARGE", 10**6)
    assert weights_digest(weights) == weights_digest(weights)
    assert len(hashed) == 2
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"key": 5}', b"[" * 10**5, b"\xff"])
def test_a_damaged_file_of_digests_is_made_anew(weights, hashed, content, tmp_path):
    weights_digest(weights)
    path = tmp_path / "cache/imagelab/digests.json"
    path.write_bytes(content)
    assert weights_digest(weights) == by_hand(weights)
    assert weights_digest(weights) == by_hand(weights)
    assert len(hashed) == 2  # once before, once for the damaged file


def test_without_a_place_to_keep_them(weights, hashed, tmp_path):
    (tmp_path / "cache").write_text("a file in the way")
    assert weights_digest(weights) == weights_digest(weights) == by_hand(weights)
    assert len(hashed) == 2
