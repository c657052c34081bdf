"""Settings, and the policies and limits in them. Immutable data that does not depend on the kernel."""
