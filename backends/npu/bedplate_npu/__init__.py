# SPDX-License-Identifier: Apache-2.0
"""The Ascend NPU backend; see ``plugin``."""
