# SPDX-License-Identifier: Apache-2.0
"""The whole engine gives transformers' greedy tokens, whatever happens on the way."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from bedplate import SamplingParams
from bedplate.config import EngineConfig
from bedplate.contract import GraphCapabilities
from bedplate.engine.core import EngineCore
from bedplate.reference.attention import reference_provider
from bedplate.reference.ops import OPERATIONS
from bedplate.registry import DecisionLog
from bedplate.registry.door import open_backend
from bedplate.runner.executor import ModelExecutor
from bedplate.runner.model_runner import ModelRunner
from bedplate.scheduling.roster import Roster
from bedplate.scheduling.scheduler import Scheduler
from bedplate.testing.graphs import RerunGraphRunner
from bedplate.testing.tiny_models import FAMILIES, family, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")

NEW = 12
LENGTHS = (5, 33, 1, 17, 48, 16)


class Recording(ModelRunner):
    """Records prompts too: graphs that run again serve whatever attention does."""

    def init_attention_backend(self):
        super().init_attention_backend()
        self.attention.extend_recordable = True


class Rig:
    """A model in a folder, its engine under given conditions, and the oracle."""

    def __init__(
        self, folder, name, *, copied=False, recorded=False, overlap=False, **settings
    ):
        model_class, config = family(name)
        self.oracle = tiny_model(model_class, config).float()
        self.vocab = config.get_text_config().vocab_size
        self.oracle.save_pretrained(folder)
        self.log = DecisionLog()
        self.config = EngineConfig(
            model=str(folder),
            backend="cpu",
            dtype="float32",
            max_running_requests=8,
            max_context_len=128,
            overlap=overlap,
            **settings,
        )
        bound = open_backend(config=self.config, reference_ops=OPERATIONS, decisions=self.log)
        bound.attention_providers.register(reference_provider)
        if copied:  # as if the device had memory of its own and worked on its own
            memory = replace(
                bound.capabilities.memory, unified=False, asynchronous=True, index_dtype="int64"
            )
            bound = replace(bound, capabilities=replace(bound.capabilities, memory=memory))
        if recorded:  # decode passes whole, from the next input to the next token
            graph = GraphCapabilities(supported=True, default=True, sampling_inside=True)
            bound = replace(
                bound,
                capabilities=replace(bound.capabilities, graph=graph),
                make_graph_runner=RerunGraphRunner,
            )
        self.bound = bound
        self.runner = (Recording if recorded else ModelRunner)(self.config, bound, self.log)
        self.runner.initialize()

    def engine(self, **options):
        plan, runner = self.runner.plan, self.runner
        scheduler = Scheduler(
            allocator=runner.allocator,
            req_to_token_pool=runner.req_to_token_pool,
            page_size=plan.page_size,
            max_context_len=plan.max_context_len,
            max_running_requests=plan.max_running_requests,
            max_prefill_tokens=self.config.chunked_prefill_tokens,
            prefix_cache=self.config.prefix_cache,
            overlap=plan.overlap,
            **options,
        )
        return EngineCore(scheduler=scheduler, executor=ModelExecutor(runner, ()))

    def prompts(self, lengths=LENGTHS):
        rng = np.random.default_rng(5)
        return [rng.integers(4, self.vocab, size=n).tolist() for n in lengths]

    def check(self, core, prompts):
        done = {}

        def collect(delta):
            if delta.output is not None:
                done[delta.request_id] = delta.output

        params = SamplingParams(max_tokens=NEW, ignore_eos=True)
        names = [core.add_request(p, params, sink=collect) for p in prompts]
        while len(done) < len(names):
            core.step()
        for prompt, name in zip(prompts, names, strict=True):
            assert done[name].finish_reason == "length", done[name].error
            self.check_one(prompt, list(done[name].token_ids))
        return [done[name] for name in names]

    def check_one(self, prompt, tokens):
        """Each token is the oracle's best, or ties with it within the numerical error."""
        assert len(tokens) == NEW
        with torch.no_grad():
            logits = self.oracle(torch.tensor([prompt + tokens]), use_cache=False).logits[0]
        rows = logits[len(prompt) - 1 : -1].float()
        picked = rows[torch.arange(NEW), torch.tensor(tokens)]
        assert (rows.max(-1).values - picked).max() <= 2e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_through_chunks_pages_and_batches(name, tmp_path):
    rig = Rig(tmp_path, name, chunked_prefill_tokens=16, page_size=8)
    core = rig.engine()
    rig.check(core, rig.prompts())
    again = rig.check(core, rig.prompts()[1:2])  # its prefix is cached now
    assert again[0].cached_tokens >= 24
    assert not rig.log.unexplained()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_resumes_exactly_after_giving_way(name, tmp_path, monkeypatch):
    preempted = []
    preempt = Roster.preempt
    monkeypatch.setattr(
        Roster,
        "preempt",
        lambda roster, request: (preempted.append(request), preempt(roster, request)),
    )
    rig = Rig(tmp_path, name, chunked_prefill_tokens=24, page_size=8, max_total_tokens=64)
    rig.check(rig.engine(), rig.prompts((20, 25, 30)))
    assert preempted, "a pool this small must make somebody give way"


CONDITIONS = {
    "plain": ({}, {}),
    "reference attention": ({"attention": "reference"}, {}),
    "gathering attention": ({"attention": "sdpa"}, {}),
    "no fusion": ({"fusion": "off"}, {}),
    "no prefix cache": ({"prefix_cache": False}, {}),
    "tiny pool": ({"max_total_tokens": 112, "page_size": 8, "chunked_prefill_tokens": 24}, {}),
    "page of one": ({"page_size": 1, "max_total_tokens": 100}, {}),
    "mixed passes": ({"chunked_prefill_tokens": 16}, {"mixed": True}),
    "overlapped": ({"overlap": True}, {}),
    "memory of its own": ({"copied": True, "overlap": True}, {}),
    "recorded whole": ({"copied": True, "recorded": True, "overlap": True}, {}),
    "recorded, a step at a time": ({"copied": True, "recorded": True}, {}),
    "recorded, in few sizes": (
        {
            "copied": True,
            "recorded": True,
            "overlap": True,
            "capture_sizes": (1, 4),  # larger batches are staged and run eagerly
            "capture_tokens": (3, 12),  # so are longer prompts
            "max_total_tokens": 112,
            "page_size": 8,
            "chunked_prefill_tokens": 16,
        },
        {"mixed": True},
    ),
    "prompts not recorded": ({"copied": True, "recorded": True, "capture_tokens": ()}, {}),
    "all at once": (
        {
            "copied": True,
            "overlap": True,
            "max_total_tokens": 112,
            "page_size": 8,
            "chunked_prefill_tokens": 16,
        },
        {"mixed": True},
    ),
}


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("condition", CONDITIONS.values(), ids=CONDITIONS.keys())
def test_every_condition(condition, name, tmp_path):
    settings, options = condition
    if settings.get("attention") == "sdpa" and name in ("gemma2", "gpt_oss"):
        settings = {
            **settings,
            "attention": None,
        }  # it refuses soft-caps and sinks, tested there
    rig = Rig(tmp_path, name, **settings)
    core = rig.engine(**options)
    outputs = rig.check(core, rig.prompts())
    if "max_total_tokens" in settings:
        assert sum(len(p) for p in rig.prompts()) + NEW * 6 > settings["max_total_tokens"]
    assert len(outputs) == len(LENGTHS)
    if settings.get("recorded"):
        prompts = rig.runner.prompt_graphs
        assert (prompts is not None) == (settings.get("capture_tokens") != ())
        assert prompts is None or prompts.stats.replays.total() > 0


def test_sampled_tokens_survive_batching_and_preemption(tmp_path):
    """Same seed, same tokens: alone, together, recorded, and in a pool that is too small."""
    roomy = Rig(tmp_path / "a", "qwen3")
    tight = Rig(tmp_path / "b", "qwen3", max_total_tokens=96, page_size=8)
    recorded = Rig(tmp_path / "c", "qwen3", copied=True, recorded=True, overlap=True)

    def run(core, prompts, seeds):
        done = {}
        params = [
            SamplingParams(max_tokens=NEW, ignore_eos=True, temperature=0.8, top_p=0.9, seed=s)
            for s in seeds
        ]
        names = [
            core.add_request(p, q, sink=lambda d: done.update({d.request_id: d.output}))
            for p, q in zip(prompts, params, strict=True)
        ]
        while any(done.get(name) is None for name in names):
            core.step()
        return [list(done[name].token_ids) for name in names]

    prompts, seeds = roomy.prompts(), range(6)
    core = roomy.engine()
    alone = [run(core, [p], [s])[0] for p, s in zip(prompts, seeds, strict=True)]
    assert run(roomy.engine(), prompts, seeds) == alone
    assert run(tight.engine(), prompts, seeds) == alone
    assert run(recorded.engine(), prompts, seeds) == alone


def test_prompt_logprobs_are_the_oracles_across_chunks(tmp_path):
    rig = Rig(tmp_path, "qwen3", chunked_prefill_tokens=16, page_size=8)
    core, done = rig.engine(), []
    prompt = rig.prompts((45,))[0]
    core.add_request(
        prompt,
        SamplingParams(max_tokens=2, ignore_eos=True, prompt_logprobs=3, logprobs=2),
        sink=lambda delta: done.append(delta.output),
    )
    while not any(done):
        core.step()
    output = done[-1]
    with torch.no_grad():
        logits = rig.oracle(
            torch.tensor([prompt + list(output.token_ids)]), use_cache=False
        ).logits
    logprobs = torch.log_softmax(logits[0].float(), -1)
    assert [entry.token_id for entry in output.prompt_logprobs] == prompt[1:]
    ours = torch.tensor([entry.logprob for entry in output.prompt_logprobs])
    theirs = logprobs[torch.arange(44), torch.tensor(prompt[1:])]
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0)
    assert all(len(entry.top) == 3 for entry in output.prompt_logprobs)
    for step, entry in enumerate(output.logprobs):
        expected = logprobs[len(prompt) - 1 + step, entry.token_id].item()
        assert entry.logprob == pytest.approx(expected, abs=2e-4)
        assert entry.top[0][1] >= entry.logprob - 1e-6
