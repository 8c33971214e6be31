# SPDX-License-Identifier: Apache-2.0
"""With a backend's package deleted, the core and every other backend go on."""

from __future__ import annotations

import shutil

import pytest
from tests.architecture.tree import BACKENDS, folders


@pytest.mark.slow
@pytest.mark.parametrize("folder", folders(BACKENDS), ids=lambda folder: folder.name)
def test_the_others_work_without_it(home, acme_wheel, folder):
    home.install(acme_wheel)
    before = home.backends()
    shutil.rmtree(home.packages / f"bedplate_{folder.name}")
    after = home.backends()
    gone = f"backend:{folder.name}"
    assert (after[gone]["status"], after[gone]["code"]) == ("failed", "HW040")
    assert {k: v for k, v in after.items() if k != gone} == {
        k: v for k, v in before.items() if k != gone
    }
    for key, row in after.items():
        if row["status"] == "usable":
            name = key.removeprefix("backend:")
            assert home.answer(name)["text"].strip() == "12 + 30 = 42.", name
    assert "HW040" in home.failure("generate", "--backend", folder.name, "-p", "Hello")
    home.run("-c", "import bedplate; bedplate.Engine, bedplate.ForwardBatch")
