# SPDX-License-Identifier: Apache-2.0
"""Every certified family through the loader, and what loading costs in memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3Config

from bedplate.models.weights import load_model, save_pretrained, update_weights_from_disk
from bedplate.testing.tiny_models import FAMILIES, family, tiny_model

IDS = torch.arange(3, 15)[None]


def logits(module):
    with torch.no_grad():
        return module(input_ids=IDS, use_cache=False).logits


def saved(name, folder, seed=0):
    model = tiny_model(*family(name), seed=seed)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_each_family_loads_updates_and_saves_as_transformers_does(name, tmp_path):
    first = saved(name, tmp_path / "first")
    second = saved(name, tmp_path / "second", seed=1)
    loaded = load_model(tmp_path / "first")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "first").eval()
    for (mine, a), (their, b) in zip(
        loaded.module.named_buffers(), theirs.named_buffers(), strict=True
    ):
        assert mine == their
        assert torch.equal(a, b), mine
        assert a.dtype == b.dtype, mine
    assert torch.equal(logits(loaded.module), logits(theirs))
    assert torch.equal(logits(loaded.module), logits(first))

    save_pretrained(loaded.index, tmp_path / "again")
    files = [load_file(tmp_path / n / "model.safetensors") for n in ("first", "again")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][n], files[1][n]) for n in files[0])

    where = {n: loaded.index.get(n).data_ptr() for n in loaded.index.names()}
    assert update_weights_from_disk(loaded.index, tmp_path / "second")
    assert {n: loaded.index.get(n).data_ptr() for n in loaded.index.names()} == where
    assert torch.equal(logits(loaded.module), logits(second))


@pytest.mark.parametrize("name", ["qwen3", "deepseek_v3", "gemma3_text", "llama4_text"])
def test_dtypes_in_bfloat16_are_those_of_transformers(name, tmp_path):
    saved(name, tmp_path)
    mine = load_model(tmp_path, dtype="bfloat16").module
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    want = {n: t.dtype for n, t in (*theirs.named_parameters(), *theirs.named_buffers())}
    assert {n: t.dtype for n, t in (*mine.named_parameters(), *mine.named_buffers())} == want


MEASURE = """
import json, sys, threading
from pathlib import Path

from bedplate.models.weights import load_model

def anonymous_bytes():
    # Not the mapped pages of files, which the system may take back at any time.
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024

load_model(sys.argv[2])  # whatever the libraries allocate once
before = peak = anonymous_bytes()
done = threading.Event()

def watch():
    global peak
    while not done.wait(0.0005):
        peak = max(peak, anonymous_bytes())

watcher = threading.Thread(target=watch)
watcher.start()
loaded = load_model(sys.argv[1])
done.set()
watcher.join()
sizes = [parameter.nbytes for parameter in loaded.module.parameters()]
print(json.dumps({"model": sum(sizes), "largest": max(sizes), "peak": peak - before}))
"""

SIZES = {
    "hidden_size": 768, "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 64,
    "dtype": "float32",
}  # fmt: skip
DENSE = Qwen3Config(num_hidden_layers=6, intermediate_size=2048, vocab_size=16_000, **SIZES)
SPARSE = MixtralConfig(
    num_hidden_layers=3, intermediate_size=1024, vocab_size=4_000, num_local_experts=8, **SIZES
)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("config", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_peak_memory_is_the_model_and_one_group(tmp_path, config):
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "big", max_shard_size="40MB")
    del model
    saved(config.model_type, tmp_path / "small")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "big"), str(tmp_path / "small")],
        capture_output=True, text=True, check=True,
        # Freed blocks go back to the system at once.
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"},
    )  # fmt: skip
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["model"] > 200e6
    assert seen["peak"] <= seen["model"] + seen["largest"] + 8e6, seen
