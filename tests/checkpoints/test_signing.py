"""OpenSSF model signing before and after relocking, as docs/checkpoints.md describes it."""

import subprocess
import sys
from pathlib import Path

import pytest

import fastlock
from tests.helpers.families import random_lock, tiny_model

pytest.importorskip("model_signing")
ec = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ec")


def keys(tmp_path: Path, name: str) -> tuple[Path, Path]:
    from cryptography.hazmat.primitives import serialization as s

    key = ec.generate_private_key(ec.SECP256R1())
    private, public = tmp_path / f"{name}.pem", tmp_path / f"{name}.pub.pem"
    private.write_bytes(key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo))
    return private, public


def model_signing(*arguments: object) -> bool:
    command = [Path(sys.executable).with_name("model_signing"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def sign(directory: Path, private: Path, *options: str) -> bool:
    given = ["--private_key", private, "--signature", directory / "model.sig", *options]
    return model_signing("sign", "key", directory, *given)


def is_signed(directory: Path, public: Path, *options: str) -> bool:
    given = ["--public_key", public, "--signature", directory / "model.sig", *options]
    return model_signing("verify", "key", directory, *given)


def test_both_signatures_hold_each_for_its_own(tmp_path) -> None:
    """A relocked directory does not pass for the original, is signed without touching it, and gives it back."""
    publisher, provider = keys(tmp_path, "publisher"), keys(tmp_path, "provider")
    model = tiny_model("llama")
    source, out, back = (tmp_path / name for name in ("source", "out", "back"))
    model.save_pretrained(source)
    assert sign(source, publisher[0])
    fastlock.relock_checkpoint(source, random_lock(model), out)
    assert not (out / "model.sig").exists()
    assert sign(out, provider[0])
    assert is_signed(out, provider[1])
    assert not is_signed(out, publisher[1])
    assert is_signed(source, publisher[1])
    fastlock.unlock_checkpoint(out, back)
    assert is_signed(back, publisher[1])
    with (out / "model-fastlock.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    assert not is_signed(out, provider[1])


def test_symbolic_links_are_signed_when_allowed(tmp_path, monkeypatch) -> None:
    private, public = keys(tmp_path, "provider")
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "source")

    def other_file_system(*paths: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", other_file_system)
    fastlock.relock_checkpoint(tmp_path / "source", random_lock(model), tmp_path / "out")
    assert (tmp_path / "out" / "model-fastlock-00001-of-00001.safetensors").is_symlink()
    assert not sign(tmp_path / "out", private)
    assert sign(tmp_path / "out", private, "--allow_symlinks")
    assert is_signed(tmp_path / "out", public, "--allow_symlinks")
