# SPDX-License-Identifier: Apache-2.0
"""A transformers model behind the face that the runner knows: batch in, logits out.

The module tree stays as transformers made it; attention goes through the bridge.  The model
runner owns one ``HFModel``, binds the attention backend once the pools exist, and calls
``forward`` once per pass, eagerly or while a graph is recorded.

Shapes: T new tokens, R rows of logits, V vocabulary, C hidden size.
"""

from __future__ import annotations

__all__ = ["HFModel"]

from typing import TYPE_CHECKING, Any

from bedplate.batch.forward_mode import CaptureHiddenMode
from bedplate.batch.logits import LogitsOutput
from bedplate.errors import ContractError, RequestTooLongError
from bedplate.models import latent
from bedplate.models import transformers_api as hf
from bedplate.models.bridge import AttentionBridge, StepContext
from bedplate.models.position_seam import PastLength, PositionSeam
from bedplate.models.rope_limit import freeze_ropes

if TYPE_CHECKING:
    from torch import Tensor, nn

    from bedplate.batch.forward_batch import ForwardBatch
    from bedplate.contract.attention import AttentionBackend
    from bedplate.contract.memory import KVPool
    from bedplate.models.spec import ModelSpec


class HFModel:
    """One causal language model of transformers on our attention.

    Args:
        module: The model, as its class makes it; weights may be loaded before or after. It
            gets configurations of its own, evaluation mode and no gradients.
        spec: What the probe saw.
        check: Compare every attention call with the spec, and every batch with its shapes.

    Attributes:
        module: The model.
        spec: What the probe saw.
        bridge: Serves its attention calls.
    """

    def __init__(self, module: Any, spec: ModelSpec, *, check: bool = False) -> None:
        self.module = module
        self.spec = spec
        self._check = check
        self._attention: AttentionBackend | None = None
        self._kv_pool: KVPool | None = None
        module.eval().requires_grad_(False)
        hf.isolate_configs(module)
        hf.set_attention(module, hf.ATTENTION_NAME)
        paths = {call.module for call in spec.calls if call.value_in_key}
        for path, expansion in latent.latent_modules(module).items():
            if path in paths:
                latent.keep_latent(expansion)
        freeze_ropes(module)
        self._seam = PositionSeam(module, spec.position_modules)
        self.bridge = AttentionBridge(module, spec.calls, check=check)

    def bind_attention(
        self, attention: AttentionBackend, kv_pool: KVPool | None = None
    ) -> None:
        """Use ``attention`` from the next pass on.

        Args:
            attention: Built from ``spec.calls``.
            kv_pool: Its pool, where fused forms may write keys and values of a decode pass
                themselves; without it they leave that to the attention.
        """
        self._attention, self._kv_pool = attention, kv_pool

    def release_attention(self) -> None:
        """Let go of the attention and its pool; bind others before the next pass."""
        self._attention = self._kv_pool = None

    def forward(self, batch: ForwardBatch, input_embeds: Tensor | None = None) -> LogitsOutput:
        """Run one pass; ``attention.prepare(batch)`` has been called.

        Neither reads the host nor synchronises, so it can be recorded; lengths are the
        caller's to check, with ``check_lengths``.  A batch without tokens is answered without
        the module, which cannot run it.

        Args:
            batch: The pass.
            input_embeds: ``[T, C]`` instead of the embeddings of ``batch.input_ids``.

        Returns:
            Logits ``[R, V]`` of ``batch.logits_rows`` in the model's dtype, and the states
            that the head received: ``[T, C]`` for ``FULL``, ``[R, C]`` for ``LAST``.

        Raises:
            ContractError: No attention is bound, or the model left the path that was probed.
        """
        if self._attention is None:
            raise ContractError("HFModel.forward came before bind_attention")
        if not batch.num_tokens:
            return self._idle(batch)
        if self._check:
            batch.check()
        rows, context = batch.logits_rows, StepContext(batch, self._attention, self._kv_pool)
        inner_rows = None
        if self.bridge.trims and not batch.capture_hidden.need_capture():
            context.wanted, rows = rows, None
        elif self.spec.takes_logits_to_keep and not batch.capture_hidden.is_full():
            inner_rows, rows = rows, None
        with self.bridge.step(context):
            output, hidden = self._run(batch, inner_rows, input_embeds)
        logits = output.logits[0] if rows is None else output.logits[0][rows]
        return LogitsOutput(next_token_logits=logits, hidden_states=hidden)

    __call__ = forward

    def _idle(self, batch: ForwardBatch) -> LogitsOutput:
        weight = next(self.module.parameters())
        hidden = None
        if batch.capture_hidden.need_capture():
            hidden = weight.new_empty((0, self.spec.hidden_size))
        logits = weight.new_empty((0, self.spec.vocab_size))
        return LogitsOutput(next_token_logits=logits, hidden_states=hidden)

    def _run(
        self, batch: ForwardBatch, rows: Tensor | None, input_embeds: Tensor | None
    ) -> tuple[Any, Tensor | None]:
        arguments: dict[str, Any] = {"use_cache": False}
        if input_embeds is None:
            arguments["input_ids"] = batch.input_ids[None]
        else:
            arguments["inputs_embeds"] = input_embeds[None]
        positions = batch.positions
        if self.spec.position_offset:
            positions = positions + self.spec.position_offset
        if self.spec.position_modules:
            self._seam.positions = positions
        else:
            arguments["position_ids"] = positions[None]
        if self.spec.past_length_seam:
            arguments["past_key_values"] = PastLength(batch.positions)
        if rows is not None:
            arguments["logits_to_keep"] = rows
        if batch.capture_hidden is CaptureHiddenMode.NULL:
            return self.module(**arguments), None
        return self._run_capturing(arguments, batch, rows)

    def _run_capturing(
        self, arguments: dict[str, Any], batch: ForwardBatch, rows: Tensor | None
    ) -> tuple[Any, Tensor | None]:
        head: nn.Module | None = hf.output_embeddings(self.module)
        if head is None:
            raise ContractError(f"{self.spec.architecture} has no head to capture states at")
        caught: list[Tensor] = []
        handle = head.register_forward_pre_hook(lambda _module, args: caught.append(args[0]))
        try:
            output = self.module(**arguments)
        finally:
            handle.remove()
        hidden = caught[-1][0]
        if batch.capture_hidden.is_last() and rows is None and batch.logits_rows is not None:
            hidden = hidden[batch.logits_rows]
        return output, hidden

    def check_lengths(self, batch: ForwardBatch) -> None:
        """Refuse requests beyond what the model serves correctly; before ``forward``.

        Apart from ``forward`` because it reads the host's lengths, which a recorded pass
        must not.

        Raises:
            RequestTooLongError: Says how long, the limit, and why.
        """
        limit = self.spec.max_position_embeddings
        if limit is None or not batch.batch_size:
            return
        longest = int(batch.seq_lens_cpu.max())
        if longest > limit:
            raise RequestTooLongError(
                f"a request is {longest} tokens long, the model serves {limit}"
                + "".join(f"; {reason}" for reason in self.spec.limits)
                + ". Shorten the prompt or ask for fewer tokens"
            )
