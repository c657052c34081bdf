"""Load a real server for a long time while its processes are killed and stopped at random; count what grows."""
