"""Keys: CURVE key pairs in files, as `drp keys` makes them. Secret ones are for their owner alone (mode 0600)."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from pathlib import Path

import zmq.auth
from zmq.utils import z85

SECRET = ".key_secret"  # noqa: S105  # how files with one end


@dataclass(frozen=True)
class Keys:
    """A server's pair in Z85, and the directory with the public keys of the clients that it lets in."""

    public: bytes
    secret: bytes
    clients: Path

    @classmethod
    def read(cls, directory: Path) -> Keys:
        """Return what `make` has put into a directory; raise ValueError that names a file without a usable key.

        The clients' files are all read here: later, one that cannot be read would keep every client out.
        """
        own, secret = pair(directory / f"server{SECRET}")
        clients = directory / "clients"
        if not clients.is_dir():
            raise ValueError(f"{clients} is no directory with the public keys of clients; `drp keys` makes it")
        for path in sorted(clients.glob("*.key")):
            public(path)
        return cls(own, secret, clients)


def make(directory: Path, clients: list[str]) -> list[Path]:
    """Make key pairs of a server and of clients in a directory, where there are none yet; return the new secret files.

    A client needs its own secret file, `clients/NAME.key_secret`, and the server's public one, `server.key`.
    """
    for name in clients:
        if not re.fullmatch(r"[\w.-]{1,100}", name) or name.startswith("."):
            raise ValueError(f"client {name!r}: a name has letters, digits, '-', '_' and '.'")
    made = []
    for folder, name in ((directory, "server"), *((directory / "clients", name) for name in clients)):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        secret = folder / f"{name}{SECRET}"
        if not secret.exists():
            secret.touch(mode=0o600)  # before there is anything in it
            zmq.auth.create_certificates(folder, name)
            made.append(secret)
    (directory / "clients").mkdir(mode=0o700, exist_ok=True)
    return made


def pair(path: Path) -> tuple[bytes, bytes]:
    """Return the public and the secret key in a file."""
    public, secret = _load(path)
    if secret is None:
        raise ValueError(f"{path} holds no secret key; give the file that ends in {SECRET}")
    return public, secret


def public(path: Path) -> bytes:
    """Return the public key in a file."""
    return _load(path)[0]


def _load(path: Path) -> tuple[bytes, bytes | None]:
    try:
        found = zmq.auth.load_certificate(path)
        for key in found:
            if key is not None and len(z85.decode(key)) != 32:
                raise ValueError(f"{len(key)} characters where a key has 40")
        return found
    except (OSError, ValueError, LookupError, struct.error) as error:  # the last two are z85's, for other characters
        raise ValueError(f"no key in {path}: {error!s:.200}; `drp keys` makes them, or remove the file") from None
