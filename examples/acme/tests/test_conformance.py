# SPDX-License-Identifier: Apache-2.0
from bedplate.conformance.suite import *  # noqa: F403
