# SPDX-License-Identifier: Apache-2.0
"""Import each named module in a process that has none of ours loaded; print a JSON object.

A fresh interpreter per module would load torch a hundred times.  This program loads the
foreign modules once (a first child tells which) and forks: every child starts without any
module of ours, and turns warnings into errors before it imports one.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
import warnings
from importlib import import_module


def in_child(modules: list[str]) -> tuple[str, set[str]]:
    """Import in a fork: the traceback, empty if all went well, and what is loaded then."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.close(reader)
        error = ""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                for module in modules:
                    import_module(module)
        except BaseException:
            error = traceback.format_exc()
        with os.fdopen(writer, "w") as out:
            json.dump([error, sorted(sys.modules)], out)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        error, loaded = json.load(answer)
    os.wait()
    return error, set(loaded)


def main() -> None:
    """Modules come as arguments."""
    names = sys.argv[1:]
    _error, loaded = in_child(names)
    for name in sorted(loaded):
        if not name.startswith(("bedplate", "__")):
            try:
                import_module(name)
            except Exception:
                continue
    gc.disable()  # a collection would touch, and so copy, every page in every child
    gc.freeze()
    json.dump({name: in_child([name])[0] for name in names}, sys.stdout)


if __name__ == "__main__":
    main()
