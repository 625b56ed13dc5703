"""Keys: CURVE key pairs in files, as `drp keys` makes them. Secret ones are for their owner alone (mode 0600)."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import zmq
import zmq.auth
from zmq.utils import z85

SECRET = ".key_secret"  # noqa: S105  # how files with one end
Role = Literal["clients", "workers"]


@dataclass(frozen=True)
class Keys:
    """A server's or leader's pair in Z85, and the names of the peers that it lets in, by public key.

    Peers may be added and removed while a socket uses the keys.
    """

    public: bytes
    secret: bytes
    peers: dict[bytes, str]

    @classmethod
    def read(cls, directory: Path, role: Role = "clients") -> Keys:
        """Return what `make` has put into a directory; raise ValueError that names a file without a usable key."""
        own, secret = pair(directory / f"server{SECRET}")
        folder = directory / role
        if not folder.is_dir():
            raise ValueError(f"{folder} is no directory with the public keys of {role}; `drp keys` makes it")
        return cls(own, secret, {public(path): path.stem for path in sorted(folder.glob("*.key"))})

    @classmethod
    def generate(cls) -> Keys:
        """Return a new pair, which is in no file and lets nobody in yet."""
        return cls(*zmq.curve_keypair(), {})

    def issue(self, name: str) -> tuple[bytes, bytes]:
        """Return a new pair of a peer, public and secret, which is let in from now on."""
        public, secret = zmq.curve_keypair()
        self.peers[public] = name
        return public, secret

    def revoke(self, name: str) -> None:
        """Let no peer with this name in any more."""
        for key in [key for key, other in self.peers.items() if other == name]:
            del self.peers[key]

    def callback(self, domain: str, key: bytes) -> bool:
        """Return whether a peer with this public key is let in; pyzmq's authenticator calls this."""
        return key in self.peers


def make(directory: Path, clients: list[str], workers: list[str] | None = None) -> list[Path]:
    """Make key pairs of a server, of clients and of workers, where there are none yet; return the new secret files.

    A client needs its own secret file, `clients/NAME.key_secret`, and the server's public one, `server.key`; a worker
    likewise with `workers/NAME.key_secret`.
    """
    named: dict[Role, list[str]] = {"clients": clients, "workers": workers or []}
    for role, names in named.items():
        for name in names:
            if not re.fullmatch(r"[\w.-]{1,100}", name) or name.startswith("."):
                raise ValueError(f"{role[:-1]} {name!r}: a name has letters, digits, '-', '_' and '.'")
    made = []
    pairs = [(directory, "server"), *((directory / role, name) for role, names in named.items() for name in names)]
    for folder, name in pairs:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        secret = folder / f"{name}{SECRET}"
        if not secret.exists():
            secret.touch(mode=0o600)  # before there is anything in it
            zmq.auth.create_certificates(folder, name)
            made.append(secret)
    for role in named:
        (directory / role).mkdir(mode=0o700, exist_ok=True)
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
