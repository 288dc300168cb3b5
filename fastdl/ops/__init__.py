"""The ops: one file a family, with schema, shapes, autograd Function, support and implementations by backend."""
