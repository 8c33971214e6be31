# SPDX-License-Identifier: Apache-2.0
"""L6: tiny models from the first token to the last, held against transformers on the host."""

from __future__ import annotations

__all__ = ["checks"]

from functools import partial
from typing import TYPE_CHECKING, Any

from bedplate.conformance.cases.attention import DTYPES
from bedplate.conformance.check import Check, Wrong, require
from bedplate.conformance.graph_attention import choose_attention
from bedplate.conformance.oracle import NEW, Oracle, greedy
from bedplate.contract.decisions import Support
from bedplate.errors import RequestTooLongError, UnsupportedError
from bedplate.runner.sampling_params import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bedplate.conformance.subject import Subject
    from bedplate.engine.engine import Engine

FAMILIES = {
    "llama": "plain",
    "qwen3": "norms of heads",
    "gemma2": "caps of scores, windows",
    "mixtral": "experts",
    "deepseek_v3": "latent attention",
}
"""Family → what is special about it."""

_LIMITS = {"float32": 1e-3, "bfloat16": 0.5, "float16": 0.1}
"""Largest difference of a log-probability from transformers in float32."""

_CONDITIONS: dict[str, dict[str, Any]] = {
    "small_chunks": {"chunked_prefill_tokens": 8},
    "mixed_passes": {"chunked_prefill_tokens": 16, "mixed": True},
    "tight_cache": {"max_total_tokens": 192, "chunked_prefill_tokens": 24},
    "no_prefix_cache": {"prefix_cache": False},
    "no_fusion": {"fusion": "off"},
    "overlap": {"overlap": True},
    "no_overlap": {"overlap": False},
}
"""Settings that must change nothing but time."""


def checks(subject: Subject) -> Iterator[Check]:
    """Families, dtypes, conditions, and what ends a text."""
    have = subject.capabilities
    for name in FAMILIES:
        yield Check(level=6, name=f"family/{name}", run=partial(_family, name, ""))
    for dtype in have.compute_dtypes:
        if dtype != "float32" and dtype in have.kv_dtypes:
            yield Check(level=6, name=f"dtype/{dtype}", run=partial(_family, "qwen3", dtype))
    for condition, settings in _CONDITIONS.items():
        run = partial(_condition, settings)
        yield Check(level=6, name=f"condition/{condition}", run=run)
    for size in have.memory.page_sizes:
        run = partial(_condition, {"page_size": size})
        yield Check(level=6, name=f"condition/page_of_{size}", run=run)
    graphs = Support.yes() if have.graph.default else Support.no("graph.default is off")
    yield Check(level=6, name="condition/graphs", declared=graphs, attempt=False, run=_graphs)
    same_bits = (
        Support.yes()
        if have.determinism == "batch_invariant"
        else Support.no(f"determinism is {have.determinism}")
    )
    yield Check(level=6, name="same_bits", run=_same_bits, declared=same_bits, attempt=False)
    others: dict[str, Callable[[Subject], dict[str, float] | None]] = {
        "alone_and_together": _alone_and_together,
        "prefix_reuse": _prefix_reuse,
        "seeds": _seeds,
        "ends": _ends,
        "streaming": _streaming,
        "failing_request": _failing_request,
    }
    for name, act in others.items():
        yield Check(level=6, name=name, run=act)


def _oracle(subject: Subject, name: str = "qwen3", dtype: str = "") -> Oracle:
    dtype = dtype or _finest(subject)
    return subject.keep(f"oracle {name} {dtype}", lambda: Oracle(name, dtype))


def _limit(subject: Subject, dtype: str = "") -> float:
    return subject.tolerance(_LIMITS.get(dtype or _finest(subject), 0.5))


def _finest(subject: Subject) -> str:
    """The finest dtype that the backend's attention reads; any, where it brings none."""
    try:
        return choose_attention(subject.bound)[0]
    except UnsupportedError:
        return DTYPES[0]


def _family(name: str, dtype: str, subject: Subject) -> dict[str, float]:
    """Ragged prompts through chunks, pages and batches."""
    oracle, prompts = _oracle(subject, name, dtype), _oracle(subject, name, dtype).prompts()
    with oracle.engine(subject, chunked_prefill_tokens=16) as engine:
        outputs = engine.generate(prompts, greedy())
    return oracle.parity(prompts, outputs).check(_limit(subject, dtype))


def _condition(settings: dict[str, Any], subject: Subject) -> dict[str, float]:
    oracle = _oracle(subject)
    prompts = oracle.prompts()
    with oracle.engine(subject, **settings) as engine:
        outputs = engine.generate(prompts, greedy(prompt_logprobs=None))
    return oracle.parity(prompts, outputs).check(_limit(subject))


def _graphs(subject: Subject) -> dict[str, float]:
    """Recorded passes change nothing but time, and there are some."""
    oracle = _oracle(subject)
    prompts = oracle.prompts()
    with oracle.engine(subject, graphs=True, capture_sizes=(1, 2, 4, 8)) as engine:
        outputs = engine.generate(prompts, greedy(prompt_logprobs=None))
        graphs = engine.runner.graph_runner
        replays = 0 if graphs is None else sum(graphs.stats.replays.values())
    require(replays, "graphs are declared as the default, and no pass is replayed")
    return oracle.parity(prompts, outputs).check(_limit(subject))


def _alone_and_together(subject: Subject) -> dict[str, float]:
    """In any batch and any order a request is right."""
    oracle = _oracle(subject)
    prompts = oracle.prompts()
    with oracle.engine(subject) as engine:
        alone = [engine.generate([prompt], greedy())[0] for prompt in prompts]
        backwards = engine.generate(prompts[::-1], greedy(prompt_logprobs=None))[::-1]
    oracle.parity(prompts, backwards).check(_limit(subject))
    return oracle.parity(prompts, alone).check(_limit(subject))


def _same_bits(subject: Subject) -> None:
    """With ``deterministic`` log-probabilities are equal bit for bit, whatever else runs."""
    oracle = _oracle(subject)
    prompts = oracle.prompts()

    def bits(engine: Engine, chosen: list[list[int]]) -> list[object]:
        outputs = engine.generate(chosen, greedy(prompt_logprobs=None))
        return [(o.token_ids, tuple(e.logprob for e in o.logprobs or ())) for o in outputs]

    with oracle.engine(subject, deterministic=True) as engine:
        alone = [bits(engine, [prompt])[0] for prompt in prompts]
        require(bits(engine, prompts) == alone, "a request's bits depend on its batch")
        backwards = bits(engine, prompts[::-1])[::-1]
        require(backwards == alone, "a request's bits depend on the order of its batch")
    with oracle.engine(subject, deterministic=True, chunked_prefill_tokens=8) as engine:
        require(bits(engine, prompts) == alone, "a request's bits depend on its chunks")
    if subject.capabilities.graph.default:
        with oracle.engine(subject, deterministic=True, graphs=True) as engine:
            require(bits(engine, prompts) == alone, "a request's bits depend on graphs")


def _prefix_reuse(subject: Subject) -> dict[str, float]:
    """A request that finds its prefix in the cache is right, and so is its neighbour."""
    oracle, page = _oracle(subject), _page(subject)
    length = 2 * max(page, 32)
    base, other = oracle.prompts((length,))[0], oracle.prompts((9,))[0]
    prompts = [base, base[: length * 5 // 8] + other, base]
    room = {"max_context_len": length + 32, "max_total_tokens": 16 * length}
    with oracle.engine(subject, page_size=page, **room) as engine:
        first = engine.generate([base], greedy(prompt_logprobs=None))
        outputs = engine.generate(prompts, greedy(prompt_logprobs=None))
    require(outputs[1].cached_tokens > 0, "a shared prefix is computed again")
    oracle.parity([base], first).check(_limit(subject))
    return oracle.parity(prompts, outputs).check(_limit(subject))


def _page(subject: Subject) -> int:
    """The first choice if it is small, as prompts are here; else the smallest that there is."""
    sizes = subject.capabilities.memory.page_sizes
    return next((size for size in sizes if size <= 32), min(sizes))


def _seeds(subject: Subject) -> None:
    """Same seed, same tokens: alone, together and after giving way; another seed, others."""
    oracle = _oracle(subject)
    prompts = oracle.prompts()

    def params(seed: int) -> SamplingParams:
        return SamplingParams(
            max_tokens=NEW, ignore_eos=True, temperature=0.8, top_p=0.9, seed=seed
        )

    wanted = [params(seed) for seed in range(len(prompts))]
    with oracle.engine(subject) as engine:
        alone = [
            engine.generate([prompt], one)[0].token_ids
            for prompt, one in zip(prompts, wanted, strict=True)
        ]
        together = [o.token_ids for o in engine.generate(prompts, wanted)]
        other = engine.generate(prompts[:1] * 4, [params(seed) for seed in range(90, 94)])
    require(together == alone, "sampled tokens depend on the rest of the batch")
    distinct = {tuple(output.token_ids) for output in other}
    require(len(distinct) > 1, "four seeds give the same tokens")
    with oracle.engine(subject, max_total_tokens=192) as engine:
        tight = [o.token_ids for o in engine.generate(prompts, wanted)]
    require(tight == alone, "sampled tokens depend on the room in the cache")
    if subject.capabilities.graph.default:
        with oracle.engine(subject, graphs=True, capture_sizes=(1, 2, 4, 8)) as engine:
            recorded = [o.token_ids for o in engine.generate(prompts, wanted)]
        require(recorded == alone, "sampled tokens depend on graphs")


def _ends(subject: Subject) -> None:
    """Stop tokens, limits, and the least number of tokens."""
    oracle = _oracle(subject)
    prompt = oracle.prompts((17,))[0]
    with oracle.engine(subject) as engine:
        (free,) = engine.generate([prompt], greedy(prompt_logprobs=None))
        tokens = list(free.token_ids)
        require(free.finish_reason == "length", f"ends by {free.finish_reason}, not by length")
        place = next(i for i, token in enumerate(tokens) if i >= 2 and token not in tokens[:i])
        stop = greedy(stop_token_ids=(tokens[place],), prompt_logprobs=None)
        (ended,) = engine.generate([prompt], stop)
        require(ended.finish_reason == "stop", f"ends by {ended.finish_reason}, not by a stop")
        require(
            len(ended.token_ids) in (place, place + 1), "a stop token does not end the text"
        )
        least = greedy(
            stop_token_ids=(tokens[place],), min_tokens=place + 3, prompt_logprobs=None
        )
        (longer,) = engine.generate([prompt], least)
        require(len(longer.token_ids) >= place + 3, "min_tokens is not kept")


def _streaming(subject: Subject) -> None:
    """Tokens one by one are the tokens at the end."""
    oracle = _oracle(subject)
    prompt = oracle.prompts((9,))[0]
    with oracle.engine(subject) as engine:
        (whole,) = engine.generate([prompt], greedy(prompt_logprobs=None))
        deltas = list(engine.stream(prompt, greedy(prompt_logprobs=None)))
    seen = [token for delta in deltas for token in delta.token_ids]
    require(seen == list(whole.token_ids), "streamed tokens are not those of the output")


def _failing_request(subject: Subject) -> None:
    """A request that cannot fit is refused alone, and the next ones are served."""
    oracle = _oracle(subject)
    prompt = oracle.prompts((9,))[0]
    with oracle.engine(subject) as engine:
        try:
            engine.generate([prompt * 50], greedy())
        except RequestTooLongError:
            pass
        else:
            raise Wrong("a prompt beyond the context is accepted")
        (after,) = engine.generate([prompt], greedy())
    oracle.parity([prompt], [after]).check(_limit(subject))
