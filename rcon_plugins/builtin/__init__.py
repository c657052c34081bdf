"""The built-in behaviour: plugins that use the same hooks as third-party plugins."""
