"""Golden vectors: messages as bytes and as JSON, and bytes that must be refused, all made from the messages' classes.

`python -m tests.vectors` writes them anew, and the types in SPEC.md, and prints what changed.
"""
