"""Generated from proto/sprat/v1 by generate.py."""
