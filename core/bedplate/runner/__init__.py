# SPDX-License-Identifier: Apache-2.0
"""The model runner: start-up stages, passes, sampling, and the way of a batch to the device."""
