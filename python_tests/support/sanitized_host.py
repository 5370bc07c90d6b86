"""A pytest plugin: `sequoia_kernels._host` is the module that $SEQUOIA_SANITIZED_HOST names. See sanitize_host.py."""

import importlib.util
import os
import sys

import sequoia_kernels

_spec = importlib.util.spec_from_file_location("sequoia_kernels._host", os.environ["SEQUOIA_SANITIZED_HOST"])
if "sequoia_kernels._host" in sys.modules:
    raise RuntimeError("sequoia_kernels._host is loaded already, and not the one that was built with sanitizers")
sequoia_kernels._host = sys.modules["sequoia_kernels._host"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sequoia_kernels._host)
