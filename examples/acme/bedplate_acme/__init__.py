# SPDX-License-Identifier: Apache-2.0
"""The acme backend of Bedplate; see ``plugin``."""
