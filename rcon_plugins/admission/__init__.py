"""Admission: one work that may run, from its start to its one outcome."""

from rcon_plugins.admission.base import Admission
from rcon_plugins.admission.inline import InlineAdmission
from rcon_plugins.admission.process import ProcessAdmission
from rcon_plugins.admission.thread import ThreadAdmission

__all__ = ["Admission", "InlineAdmission", "ProcessAdmission", "ThreadAdmission"]
