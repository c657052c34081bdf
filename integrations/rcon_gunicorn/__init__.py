"""Confine each request that gunicorn serves. The application does not change.

With no configuration file of one's own::

    RCON_SETTINGS=rcon.toml gunicorn -c python:rcon_gunicorn.conf app:app

In one's own ``gunicorn.conf.py``, at its end::

    from rcon_gunicorn import Hooks

    Hooks("rcon.toml").install(globals())
"""

from rcon_gunicorn.hooks import Hooks, StartRefused, chain

__all__ = ["Hooks", "StartRefused", "chain"]
