# SPDX-License-Identifier: Apache-2.0
"""An observer plugin for Bedplate; see ``plugin``."""
