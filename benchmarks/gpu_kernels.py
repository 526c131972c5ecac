"""The kernels that torch's compiler makes of a function for a GPU that is not there.

A function is traced on the CPU, forwards and back. Its two graphs are then taken for graphs of a
GPU and scheduled as such: what is fused with what, in which buffers. No kernel is written or run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import scheduler
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.graph import GraphLowering
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from milan.core.device import autocast

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
_A100 = SimpleNamespace(
    name="A100", major=8, minor=0, multi_processor_count=108, regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, warp_size=32,
    shared_memory_per_block_optin=166912,
)  # fmt: skip


class Kernel(NamedTuple):
    """One kernel of a compiled graph."""

    kind: str
    """What it does, in a word or two."""
    size: int
    """Bytes of its inputs and outputs, each once, as torch's compiler counts them itself."""


def kernels_of(function: Callable[..., torch.Tensor], *inputs: object) -> list[Kernel]:
    """Those of `function` in bf16 and of its gradient; the function is not run."""
    found: list[Kernel] = []
    graphs = 0

    def scheduled(graph: GraphLowering) -> None:
        nonlocal graphs
        graph.init_wrapper_code()
        graph._update_scheduler()
        for node in graph.scheduler.nodes:
            if size := node.get_read_write_buffers_sizes():
                found.append(Kernel(_kind(node), size))
        graphs += 1
        raise _Scheduled

    def for_gpu(graph: Any, given: Any, **options: Any) -> Any:
        values = [node.meta.get("val") for node in graph.graph.nodes]
        for value in tree_leaves([values, given]):
            if isinstance(value, torch._subclasses.FakeTensor):
                value.fake_device = GPU
        for node in graph.graph.nodes:
            if node.kwargs.get("device") is not None:
                node.kwargs = {**node.kwargs, "device": GPU}
        try:
            with _a_gpu(scheduled):
                compile_fx_inner(graph, given, **options)
        except _Scheduled:
            if graphs == 2:
                raise
        return graph

    def backend(graph: Any, given: Any) -> Any:
        return compile_fx(graph, given, inner_compile=for_gpu)

    torch._dynamo.reset()
    with (
        mock.patch.object(F, "scaled_dot_product_attention", _attention),
        torch._inductor.config.patch(fx_graph_cache=False, compile_threads=1),
        torch._functorch.config.patch(force_non_lazy_backward_lowering=True),
        autocast(CPU, "bf16"),
    ):
        try:
            torch.compile(function, backend=backend, dynamic=False, fullgraph=True)(*inputs)
        except _Scheduled:
            return found
    raise AssertionError("torch's compiler did not come to both graphs")


class _Scheduled(BaseException):
    """A graph is scheduled; nothing comes after."""


@contextmanager
def _a_gpu(scheduled: Callable[[GraphLowering], None]) -> Iterator[None]:
    """Inside, the compiler sees a GPU, and `scheduled` gets each graph in place of codegen."""
    torch._C._ensureCUDADeviceGuardSet()
    answers = {
        "get_device_properties": lambda device=None: _A100,
        "current_device": lambda: 0,
    }
    with ExitStack() as patches:
        for name, answer in answers.items():
            for where in (torch.cuda, CudaInterface, CudaInterface.Worker):
                patches.enter_context(mock.patch.object(where, name, answer))
        for where, name, answer in (
            (torch.cuda, "is_available", lambda: True),
            (torch.cuda, "get_device_capability", lambda device=None: (8, 0)),
            (torch.cuda, "device_count", lambda: 1),
            (torch.cuda, "synchronize", lambda device=None: None),
            (torch.cuda, "get_rng_state", lambda: torch.get_rng_state()),
            (torch.cuda, "set_rng_state", lambda state: None),
            (torch.cuda, "_exchange_device", lambda device: 0),
            (torch.cuda, "_maybe_exchange_device", lambda device: 0),
            (scheduler, "has_triton", lambda: True),
            (GraphLowering, "codegen", scheduled),
        ):
            patches.enter_context(mock.patch.object(where, name, answer))
        yield


def _kind(node: Any) -> str:
    if node.is_extern():
        name = str(getattr(node.node, "python_kernel_name", ""))
        return "attention" if "attention" in name else "products"
    parts = [part.node for part in node.get_nodes() if part.node is not None]
    does = {str(origin.target) for part in parts for origin in part.get_origins()}
    has = lambda *names: any(name in target for name in names for target in does)  # noqa: E731
    if node.is_reduction():
        reads = [dep.name for dep in node.read_writes.reads]
        return "sums of rows for biases" if len(set(reads)) == 1 else "norms, sums between blocks"
    if has("erf"):
        return "GELU and its gradient"
    if has("cat.", "gather", "index", "scatter", "sort"):
        return "joins and gathers"
    if has("convert_element_type") and not has("add.", "mul.", "sub.", "div."):
        return "casts"
    return "norms, sums between blocks"


@torch.library.custom_op("milan_benchmarks::attention", mutates_args=())
def _fused_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A GPU's: output and the logarithms of the sums, of which its gradient is computed."""
    raise NotImplementedError("only its shapes are asked for: kernels are counted, not run")


@torch.library.custom_op("milan_benchmarks::attention_backward", mutates_args=())
def _attention_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    sums: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of q, k, v."""
    raise NotImplementedError("only its shapes are asked for: kernels are counted, not run")


def _like(x: torch.Tensor) -> torch.Tensor:
    # [B, heads, tokens, channels], in memory [B, tokens, heads, channels]
    return torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(
        1, 2
    )


@_fused_attention.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)


@_attention_backward.register_fake
def _(grad: Any, q: Any, k: Any, v: Any, out: Any, sums: Any) -> tuple[torch.Tensor, ...]:
    return _like(q), _like(k), _like(v)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs, *output)


def _gradient(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> Any:
    return _attention_backward(grad, *ctx.saved_tensors)


_fused_attention.register_autograd(_gradient, setup_context=_keep)


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: object) -> torch.Tensor:
    return _fused_attention(q, k, v)[0]
