"""Admission: one unit of work that may run, from its start to its outcome."""

from rcon_plugins.confinement.admission.base import Admission, Host, LocalAdmission
from rcon_plugins.confinement.admission.inline import InlineAdmission
from rcon_plugins.confinement.admission.process import ProcessAdmission
from rcon_plugins.confinement.admission.thread import ThreadAdmission

__all__ = ["Admission", "Host", "InlineAdmission", "LocalAdmission", "ProcessAdmission", "ThreadAdmission"]
