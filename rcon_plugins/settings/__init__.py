"""What people write: settings, and the policies and limits in them. Immutable data that names nothing of the kernel."""
