# SPDX-License-Identifier: Apache-2.0
"""``python -m bedplate``: the command line without its script."""

from __future__ import annotations

from bedplate.cli.main import main

if __name__ == "__main__":
    main()
