"""Bytes <-> records: the container format, without torch, network or knowledge of models.

See SPEC.md.
"""

FORMAT_VERSION = "1.3"
"""Newest version that this package reads and writes."""

STEPS_VERSION = "1.2"
"""Version that a container names whose steps were chosen, and which uses nothing newer."""

BASE_VERSION = "1.1"
"""Version that a container names which uses nothing of a newer one (SPEC.md 12)."""

WRITER_VERSION = "0.1.0"
"""Version of the package; stands in every manifest. The format's version is a number of its own."""
