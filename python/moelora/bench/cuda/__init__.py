"""The same on a GPU: `moelora bench --device cuda`."""
