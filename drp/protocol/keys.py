"""CURVE key pairs in files, as `drp keys` makes them. Only the owner can read secret ones (mode 0600)."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import zmq
import zmq.auth
from zmq.utils import z85

SECRET = ".key_secret"  # noqa: S105  # the ending of a file with a secret key
Role = Literal["clients", "workers"]


@dataclass(frozen=True)
class Keys:
    """The key pair of a server or leader, in Z85, and the names of the peers that it admits, by public key.

    Peers may be added and removed while a socket uses the keys.
    """

    public: bytes
    secret: bytes
    peers: dict[bytes, str]

    @classmethod
    def read(cls, directory: Path, role: Role = "clients") -> Keys:
        """Read the files that `make` has written to a directory.

        Raises ValueError if a file has no usable key; the error names the file.
        """
        own, secret = pair(directory / f"server{SECRET}")
        folder = directory / role
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a directory with the public keys of {role}; make it with `drp keys`")
        return cls(own, secret, {public(path): path.stem for path in sorted(folder.glob("*.key"))})

    @classmethod
    def generate(cls) -> Keys:
        """Return a new key pair that is in no file, and admits no peer yet."""
        return cls(*zmq.curve_keypair(), {})

    def issue(self, name: str) -> tuple[bytes, bytes]:
        """Admit a new peer; return its public and its secret key."""
        public, secret = zmq.curve_keypair()
        self.peers[public] = name
        return public, secret

    def revoke(self, name: str) -> None:
        """Stop admitting the peers with this name."""
        for key in [key for key, other in self.peers.items() if other == name]:
            del self.peers[key]

    def callback(self, domain: str, key: bytes) -> bool:
        """Return whether a peer with this public key is admitted; pyzmq's authenticator calls this."""
        return key in self.peers


def make(directory: Path, clients: list[str], workers: list[str] | None = None) -> list[Path]:
    """Make the missing key pairs of a server, of clients and of workers; return the files of the new secret keys.

    A client needs its secret key, `clients/NAME.key_secret`, and the server's public key, `server.key`; a worker needs
    `workers/NAME.key_secret` and `server.key`.

    Raises ValueError for a name that cannot be a file's.
    """
    named: dict[Role, list[str]] = {"clients": clients, "workers": workers or []}
    for role, names in named.items():
        for name in names:
            if not re.fullmatch(r"[\w.-]{1,100}", name) or name.startswith("."):
                raise ValueError(
                    f"{role[:-1]} {name!r}: a name has letters, digits, '-', '_' and '.', which is not its first"
                )
    made = []
    pairs = [(directory, "server"), *((directory / role, name) for role, names in named.items() for name in names)]
    for folder, name in pairs:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        secret = folder / f"{name}{SECRET}"
        if not secret.exists():
            secret.touch(mode=0o600)  # The mode is set before the key is written.
            zmq.auth.create_certificates(folder, name)
            made.append(secret)
    for role in named:
        (directory / role).mkdir(mode=0o700, exist_ok=True)
    return made


def pair(path: Path) -> tuple[bytes, bytes]:
    """Return the public and the secret key in a file."""
    public, secret = _load(path)
    if secret is None:
        raise ValueError(f"{path} has no secret key; give the file that ends in {SECRET}")
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
    except (OSError, ValueError, LookupError, struct.error) as error:  # z85 raises the last two for other characters
        raise ValueError(f"no key in {path}: {error!s:.200}; `drp keys` makes them, or remove the file") from None
