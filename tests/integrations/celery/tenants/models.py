"""The tenants."""

from __future__ import annotations

from typing import Any

from django.db import models
from django_tenants import models as tenant_models

fields: Any = models  # these libraries have no types of their own
bases: Any = tenant_models


class Client(bases.TenantMixin):
    """A tenant. The test makes its schema."""

    name = fields.CharField(max_length=100)
    auto_create_schema = False

    class Meta:
        app_label = "tenants"


class Domain(bases.DomainMixin):
    """The domain of a tenant."""

    class Meta:
        app_label = "tenants"
