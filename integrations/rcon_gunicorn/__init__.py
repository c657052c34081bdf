"""Confine each request that gunicorn serves. The application does not change.

Without a gunicorn.conf.py::

    RCON_SETTINGS=rcon.toml gunicorn -c python:rcon_gunicorn.conf app:app

At the end of an existing ``gunicorn.conf.py``::

    from rcon_gunicorn import Hooks

    Hooks("rcon.toml").install(globals())
"""

from rcon_gunicorn.hooks import Hooks, StartRefused, chain

__all__ = ["Hooks", "StartRefused", "chain"]
