# SPDX-License-Identifier: Apache-2.0
"""Trains the demo model against the clock and writes a checkpoint every minute.

Worker processes generate fresh text all the time, so no chat is seen twice. The last part
of the time trains on long rows. ``README.md`` here has the command of the shipped file::

    python -m scripts.demo_model.train --docs .carry/docs.txt.xz --out /tmp/demo --seconds 540
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from queue import Queue as LocalQueue
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save_file
from scripts.demo_model.docs_text import read_docs
from scripts.demo_model.network import CONFIG, Network
from scripts.demo_model.pack import encode_docs, feed
from tokenizers import Tokenizer
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["main"]

_STARTED = time.monotonic()
_GENERATION = {"do_sample": False, "eos_token_id": [2, 0], "pad_token_id": 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to train on and how fast."""

    seconds: float
    """From the start of the process to the last step."""
    batch_tokens: int
    widths: tuple[int, int]
    """Row widths of the first part and of the last."""
    long_part: float
    rate: float
    warm_up: int
    workers: int
    seed: int
    compiled: bool


def _start_feed(plan: Plan, folder: Path) -> tuple[Any, Any]:
    """Workers that fill a queue with rows; the returned value holds their row width."""
    context = multiprocessing.get_context("spawn")
    queue, width = context.Queue(maxsize=64), context.Value("i", plan.widths[0])
    for worker in range(plan.workers):
        context.Process(
            target=feed, args=(queue, folder, (plan.seed, worker), width, plan.batch_tokens),
            daemon=True,
        ).start()  # fmt: skip
    return queue, width


def _batches(queue: Any, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches on the device; a thread unpacks ahead of use."""
    ready: LocalQueue[tuple[Tensor, Tensor]] = LocalQueue(maxsize=8)

    def unpack() -> None:
        while True:
            tokens, weights = (torch.from_numpy(array) for array in queue.get())
            if device.type != "cpu":
                tokens, weights = tokens.pin_memory(), weights.pin_memory()
            ready.put((tokens, weights))

    threading.Thread(target=unpack, daemon=True).start()
    while True:
        tokens, weights = (part.to(device, non_blocking=True) for part in ready.get())
        yield tokens.long(), weights


def _optimizer(network: Network, plan: Plan, device: torch.device) -> torch.optim.AdamW:
    matrices = [weight for weight in network.parameters() if weight.ndim == 2]
    vectors = [weight for weight in network.parameters() if weight.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=plan.rate, betas=(0.9, 0.95), fused=device.type != "cpu"
    )


def save(network: Network, folder: Path) -> None:
    """Weights in bfloat16, ``config.json`` and ``generation_config.json``."""
    state = {name: value.detach().to("cpu", torch.bfloat16).contiguous()
             for name, value in network.state_dict().items()}  # fmt: skip
    save_file(state, folder / "model.safetensors.part", metadata={"format": "pt"})
    (folder / "model.safetensors.part").rename(folder / "model.safetensors")
    (folder / "model.safetensors").chmod(0o644)
    for name, content in (("config", CONFIG), ("generation_config", _GENERATION)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


class _Trainer:
    """Network, optimizer and the one step that both row widths share."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        torch.manual_seed(plan.seed)
        self.network = Network().to(device)
        self._optimizer = _optimizer(self.network, plan, device)
        loss = self.network.loss
        self._loss = torch.compile(loss, dynamic=False) if plan.compiled else loss
        for row in plan.widths if plan.compiled else ():  # compile before the clock runs
            zeros = torch.zeros(plan.batch_tokens // row, row, dtype=torch.long, device=device)
            self.step(zeros, torch.ones_like(zeros, dtype=torch.uint8), rate=0.0)[0].item()
        self._optimizer.state.clear()

    def step(self, tokens: Tensor, weights: Tensor, rate: float) -> tuple[Tensor, Tensor]:
        """One update; loss and gradient norm stay on the device."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(tokens.device.type, torch.bfloat16):
            loss = self._loss(tokens, weights)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.detach(), norm


def train(plan: Plan, folder: Path) -> None:
    """Train until the time is over; ``folder`` holds ``tokenizer.json`` and ``docs.npy``."""
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    queue, width = _start_feed(plan, folder)
    trainer = _Trainer(plan, device)
    begin = logged = saved = time.monotonic()
    left = plan.seconds - (begin - _STARTED)
    if left <= 0:
        raise SystemExit(
            f"setting up took all of the {plan.seconds:.0f} s: give more --seconds"
        )
    print(f"set up in {begin - _STARTED:.0f} s; {left:.0f} s of training", flush=True)
    for count, (tokens, weights) in enumerate(_batches(queue, device), start=1):
        now = time.monotonic()
        progress = (now - begin) / left
        if progress >= 1.0:
            break
        if progress > 1.0 - plan.long_part:
            width.value = plan.widths[1]
        rate = plan.rate * min(1.0, count / plan.warm_up) * (1.0 - progress)
        loss, norm = trainer.step(tokens, weights, rate)
        if count % 20 == 0:
            loss.item()  # keeps the host, whose clock sets the rate, close to the device
        if now - logged > 10:
            logged = now
            seen = count * plan.batch_tokens / 1e6
            print(
                f"{now - begin:6.0f} s  step {count:6d}  {seen:7.1f} M tokens  "
                f"{seen / (now - begin):5.2f} M/s  width {tokens.shape[1]:4d}  "
                f"rate {rate:.2e}  loss {loss.item():.4f}  norm {norm.item():.2f}  "
                f"waiting batches {queue.qsize()}",
                flush=True,
            )
        if now - saved > 60:
            saved = now
            save(trainer.network, folder)
    save(trainer.network, folder)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--docs", type=Path, required=True, help="file of docs_text")
    parser.add_argument("--tokenizer", type=Path, default=Path("core/bedplate/demo"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=540)
    parser.add_argument("--batch-tokens", type=int, default=131072)
    parser.add_argument("--widths", type=int, nargs=2, default=(512, 2048))
    parser.add_argument("--long-part", type=float, default=0.15)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--warm-up", type=int, default=300)
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eager", action="store_true", help="do not compile")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (args.out / name).write_bytes((args.tokenizer / name).read_bytes())
    tokenizer = Tokenizer.from_file(str(args.out / "tokenizer.json"))
    np.save(args.out / "docs.npy", encode_docs(tokenizer, read_docs(args.docs)))
    plan = Plan(
        seconds=args.seconds, batch_tokens=args.batch_tokens, widths=tuple(args.widths),
        long_part=args.long_part, rate=args.rate, warm_up=args.warm_up, workers=args.workers,
        seed=args.seed, compiled=not args.eager,
    )  # fmt: skip
    train(plan, args.out)
    (args.out / "docs.npy").unlink()


if __name__ == "__main__":
    main()
