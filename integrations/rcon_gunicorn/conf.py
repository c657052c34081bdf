"""A gunicorn configuration module: ``RCON_SETTINGS=rcon.toml gunicorn -c python:rcon_gunicorn.conf app:app``.

The environment is read when gunicorn starts, or here with ``gunicorn --check-config``, which calls no hook.
"""

from rcon_gunicorn.hooks import Hooks

hooks = Hooks()

on_starting = hooks.on_starting
on_reload = hooks.on_reload
nworkers_changed = hooks.nworkers_changed
post_fork = hooks.post_fork
post_worker_init = hooks.post_worker_init
worker_exit = hooks.worker_exit
child_exit = hooks.child_exit
pre_exec = hooks.pre_exec
on_exit = hooks.on_exit

hooks.check_config(globals())
