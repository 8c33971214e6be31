# SPDX-License-Identifier: Apache-2.0
"""A one-kernel override pack for Bedplate; see ``plugin``."""
