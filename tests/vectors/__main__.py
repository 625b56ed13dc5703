"""`python -m tests.vectors`: write the vectors and the types in SPEC.md anew; print what changed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from drp.protocol import client_messages, messages
from drp.protocol.codec import encode, to_fields
from tests.vectors import examples
from tests.vectors.tables import fill, records

HERE = Path(messages.__file__).with_name("vectors")
SPEC = HERE.parent / "SPEC.md"


def rendered() -> dict[Path, str]:
    """Return what each file should hold."""
    files: dict[Path, str] = {}
    for protocol in examples.PROTOCOLS:
        made = examples.examples(protocol)
        files[HERE / f"{protocol}.hex"] = "".join(f"{name} {encode(m).hex()}\n" for name, m in made.items())
        files[HERE / f"{protocol}.json"] = _json(
            {n: {"type": n.split("/")[0], **to_fields(m)} for n, m in made.items()}
        )
    refused = examples.refused()
    files[HERE / "refused.hex"] = "".join(f"{name} {data.hex() or '-'}\n" for name, (data, _) in refused.items())
    files[HERE / "refused.json"] = _json({name: why for name, (_, why) in refused.items()})
    versions = {"the client": client_messages.VERSION, "the worker": messages.VERSION}
    files[SPEC] = fill(SPEC.read_text(), spec_records(), versions)
    return files


def spec_records() -> dict[str, type]:
    """Return every class that SPEC.md has a table of."""
    found: dict[str, type] = {}
    for directions in examples.PROTOCOLS.values():
        for kinds in directions:
            for name, kind in records(dict(kinds)).items():
                assert found.setdefault(name, kind) is kind, f"two classes are called {name}"
    return found


def _json(content: dict[str, object]) -> str:
    lines = (
        f"  {json.dumps(name)}: {json.dumps(value, ensure_ascii=False, default=bytes.hex)}"
        for name, value in content.items()
    )
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main() -> int:
    """Write what differs."""
    for path, text in rendered().items():
        before = path.read_text() if path.exists() else ""
        if before != text:
            path.write_text(text)
            old, new = set(before.splitlines()), set(text.splitlines())
            sys.stdout.write(f"{path.name}: {len(new - old)} lines written, {len(old - new)} removed\n")
            for line in sorted(new ^ old)[:20]:
                sys.stdout.write(f"  {'+' if line in new else '-'} {line[:150]}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
