"""A Django project with a PostgreSQL schema for each tenant (django-tenants, tenant-schemas-celery)."""
