"""``gunicorn --check-config``: find out, while gunicorn reads its configuration, that it only checks it.

gunicorn then loads configuration and application, and calls no hook. So the adapter has to know from the configuration
file itself. Source: gunicorn's ``app/base.py``.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: ``--check-config`` or the beginning of it. Whether it is that, gunicorn's own parser decides.
_MAY_BE_CHECK = re.compile(r"--ch[a-z-]*")


class CheckFailed(SystemExit):
    """Ends ``gunicorn --check-config`` with one line and status 1.

    Not an `Exception`: gunicorn's reader of configuration files shows a traceback for each of those.
    """


def checked_configuration(config: Mapping[str, Any]) -> Any | None:
    """Return gunicorn's whole configuration if it only checks it; None otherwise.

    ``config`` is the namespace of the configuration file. As in gunicorn, the environment overrides it, and the command
    line overrides both.
    """
    given = [shlex.split(os.environ.get("GUNICORN_CMD_ARGS", "")), sys.argv[1:]]
    if not config.get("check_config") and not any(
        _MAY_BE_CHECK.fullmatch(word) for word in itertools.chain(*given)
    ):
        return None
    from gunicorn.config import Config  # type: ignore[import-untyped]

    found = Config()
    for name, value in config.items():
        if name in found.settings:
            found.set(name, value)
    parser = found.parser()
    for arguments in given:
        # Another program may have started gunicorn, with arguments of its own.
        options, _ = parser.parse_known_args(arguments)
        for name, value in vars(options).items():
            if value is not None and name != "args":
                found.set(name, value)
    return found if found.check_config else None


def look_where_it_will_serve(cfg: Any) -> None:
    """Have modules found where gunicorn will find them: it goes to its directory after the configuration is read."""
    for path in (*(cfg.pythonpath or "").split(","), cfg.chdir):
        if path and (found := str(Path(path).absolute())) not in sys.path:
            sys.path.insert(0, found)
