"""Splits a network before its first noisy layers, so that many noisy passes share what they have in common."""

import operator
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

_ONE_TRACE_AT_A_TIME = threading.RLock()
"""torch.fx changes how every module is called while it traces one: two at a time would leave it changed."""


def split(
    model: nn.Module, is_noisy: Callable[[nn.Module], bool], is_the_same: Callable[[nn.Module], bool]
) -> tuple[nn.Module, nn.Module] | None:
    """The part of `model` that no noisy layer reaches, and the rest: model(x) = rest(*beginning(x)).

    Both share the modules of `model`; the rest may do two of them in one step. None if the network's forward cannot
    be traced by torch.fx, or what is traced is not the same by `is_the_same`, or changes in place what others may see,
    or if it has hooks that the traced parts would not call.
    """
    tracer = _Tracer(is_noisy)
    try:
        with _ONE_TRACE_AT_A_TIME:
            graph = tracer.trace(model)
    except Exception:  # whatever the network's own code raises on torch.fx's proxies
        return None
    if any(has_hooks(module) for module in model.modules() if module not in tracer.leaves):
        return None
    noisy: set[fx.Node] = set()
    of_x: set[fx.Node] = set()
    for node in graph.nodes:
        module = model.get_submodule(str(node.target)) if node.op == "call_module" else nn.Module()
        if any(map(is_noisy, module.modules())) or any(source in noisy for source in node.all_input_nodes):
            noisy.add(node)
        if node.op == "placeholder" or any(source in of_x for source in node.all_input_nodes):
            of_x.add(node)
    *_, output = graph.nodes
    if sum(node.op == "placeholder" for node in graph.nodes) != 1 or output not in noisy:
        return None
    if any(_changes_what_others_see(node, model, is_noisy) for node in graph.nodes):
        return None
    if not is_the_same(fx.GraphModule(model, graph)):
        return None

    beginning, rest = fx.Graph(), fx.Graph()
    in_beginning: dict[fx.Node, fx.Node] = {}
    in_rest: dict[fx.Node, fx.Node] = {}
    handed_on = [n for n in graph.nodes if n in of_x and n not in noisy and any(user in noisy for user in n.users)]
    for node in handed_on:
        in_rest[node] = rest.placeholder(node.name)
    for node in graph.nodes:
        if node in noisy or node not in of_x:  # what does not depend on x is no part of the batch
            in_rest[node] = rest.node_copy(node, lambda n: in_rest[n])
        if node not in noisy:
            in_beginning[node] = beginning.node_copy(node, lambda n: in_beginning[n])
    beginning.output(tuple(in_beginning[node] for node in handed_on))
    return fx.GraphModule(model, beginning), _fused(fx.GraphModule(model, rest))


FRESH_MODULES = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.Linear)
FRESH_FUNCTIONS = (operator.add, operator.sub, operator.mul, torch.add, torch.cat)
"""Whose output is a tensor of its own, that no other name leads to."""


def _changes_what_others_see(node: fx.Node, model: nn.Module, is_noisy: Callable[[nn.Module], bool]) -> bool:
    """Whether a step works in place, as `nn.ReLU(inplace=True)`, on a tensor that another step may use."""
    module = model.get_submodule(str(node.target)) if node.op == "call_module" else None
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    by_name = node.op in ("call_method", "call_function") and name.endswith("_") and not name.endswith("__")
    by_argument = bool(node.kwargs.get("inplace") or "out" in node.kwargs or any(a is True for a in node.args[1:]))
    if not (by_name or by_argument or getattr(module, "inplace", False)):
        return False
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or len(source.users) > 1:
        return True
    if source.op == "call_module":
        before = model.get_submodule(str(source.target))
        return not (isinstance(before, FRESH_MODULES) or is_noisy(before))
    return source.target not in FRESH_FUNCTIONS


def _fused(module: fx.GraphModule) -> fx.GraphModule:
    """Let each noisy layer that can do so take the steps before it into its own."""
    for node in list(module.graph.nodes):
        while both := _absorbed(module, node):
            source = node.args[0]
            module.add_submodule(f"{node.name}_fused", both)
            node.target = f"{node.name}_fused"
            node.args = source.args
            module.graph.erase_node(source)
    module.graph.lint()
    module.recompile()
    return module


def _absorbed(module: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The step before and this one as one, if that may be."""
    source = node.args[0] if node.args else None
    if node.op != "call_module" or not isinstance(source, fx.Node) or source.op != "call_module":
        return None
    before, layer = (module.get_submodule(str(n.target)) for n in (source, node))
    absorb = getattr(layer, "absorb", None)
    if absorb is None or len(source.users) > 1 or has_hooks(before) or has_hooks(layer):
        return None
    both: nn.Module | None = absorb(before)
    return both


class _Tracer(fx.Tracer):
    """Takes torch's own modules, linear layers of any make and noisy layers as single steps, and remembers them.

    Stops at a hook of any other module, which would be called with a proxy.
    """

    def __init__(self, is_noisy: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self.is_noisy = is_noisy
        self.leaves: set[nn.Module] = set()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        leaf = self.is_noisy(m) or isinstance(m, nn.Linear) or super().is_leaf_module(m, module_qualified_name)
        if leaf:
            self.leaves.add(m)
        return leaf

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if has_hooks(m) and not self.is_leaf_module(m, ""):
            raise ValueError("a hook of a module that is no single step")
        return super().call_module(m, forward, args, kwargs)


def has_hooks(module: nn.Module) -> bool:
    """Whether anything waits for the module to be called."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
