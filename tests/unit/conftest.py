"""Settings of hypothesis. Only this tier uses it: other runs do not load it, as each fork of theirs would copy it."""

from __future__ import annotations

import hypothesis

# Timings are never asserted, so neither by hypothesis; machines under test are slow.
hypothesis.settings.register_profile("rcon", deadline=None)
hypothesis.settings.load_profile("rcon")
