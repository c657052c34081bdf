"""Settings of hypothesis, which only these tests use. An emulated machine takes seconds to import it."""

from __future__ import annotations

import hypothesis

# Timings are never asserted, so neither by hypothesis; machines under test are slow.
hypothesis.settings.register_profile("rcon", deadline=None)
hypothesis.settings.load_profile("rcon")
