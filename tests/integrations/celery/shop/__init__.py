"""A Django project with PostgreSQL whose Celery tasks are confined, or not."""
