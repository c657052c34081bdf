"""The tables of the shop."""

from __future__ import annotations

from typing import Any

from django.db import models

fields: Any = models  # Django has no types of its own


class Order(fields.Model):
    """An order."""

    name = fields.CharField(max_length=100)

    class Meta:
        app_label = "shop"
