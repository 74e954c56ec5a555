"""Follow data and parameters through one forward pass: do values move rows, and who reads which parameter?

Where the examples lie in a layer's tensors follows from shapes alone in most models, and one check per shape is enough.
It does not in a model that picks valid tokens, sorts by length or routes tokens to experts: there every batch has to be
checked. Tensors computed from the inputs are followed through one forward pass, by their storage. So are parameters: a
rule sees only what a layer does with its own.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ALWAYS = {
    *("nonzero", "nonzero_static", "masked_select", "unique_dim", "_unique2", "unique_consecutive"),
    *("repeat_interleave", "_pack_padded_sequence", "_nested_tensor_from_mask"),
}
_BY_INDEX = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put"}
_ALONG_DIM = {
    *("index_select", "gather", "index_add", "index_add_", "index_copy", "index_copy_", "index_fill", "index_fill_"),
    *("scatter", "scatter_", "scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_"),
}
_READS = {"_local_scalar_dense", "equal"}
_ANSWERS = {"__bool__", "__int__", "__index__", "item", "equal", "allclose", "is_nonzero"}  # what `Answers` records
_TO_PYTHON = {"tolist", "numpy", "__array__", "__dlpack__"}


class DataFlow(TorchDispatchMode):
    """Follows the inputs of a model through its operations.

    Args:
        inputs: of the model; a dimension of a multiple of their number may run over examples.
        layers: name → module, of layers that alone should read their trainable parameters.

    Attributes:
        moves_rows: whether rows were moved by the data, or values of it reached Python unseen.
        answers: whether Python was told values that `Answers` can record: a model that branches, say.
        used_outside: the name of a layer with a parameter that something else has read.
    """

    def __init__(self, inputs: Tensor, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.views, self.moves_rows, self.answers, self.used_outside = len(inputs), False, False, ""
        self.asked = ""  # the function that Python called last
        self._mark, self._layers, self._active = object(), layers, [""]
        self._python = _ToPython(self)
        self._hooks: list[Any] = []
        self.follow(inputs)

    def __enter__(self) -> "DataFlow":
        self._owners: dict[Any, set[str]] = {}
        for name, layer in self._layers.items():
            for p in layer.parameters():
                if p.requires_grad:
                    self._owners.setdefault(_place(p), set()).add(name)
            before = layer.register_forward_pre_hook(lambda *_, name=name: self._active.append(name))
            self._hooks += [before, layer.register_forward_hook(lambda *_: self._leave(), always_call=True)]
        self._python.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._python.__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def _leave(self) -> None:
        self._active.pop()

    def follow(self, x: Tensor) -> None:
        """Remember that a tensor's values come from the inputs."""
        x.untyped_storage()._dpopt_data = self._mark  # type: ignore[attr-defined]

    def of_data(self, x: Any) -> bool:
        """Whether a tensor's values come from the inputs."""
        return isinstance(x, Tensor) and getattr(x.untyped_storage(), "_dpopt_data", None) is self._mark

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        data = any(self.of_data(x) for x in tensors)
        for x in tensors:
            owners = self._owners.get(_place(x))
            if owners and owners.isdisjoint(self._active):
                self.used_outside = min(owners)
        if data:
            self.moves_rows |= self._moves_rows(name, args)
        result = func(*args, **kwargs)
        if data and not name.endswith("_like") and not name.startswith("new_"):
            for x in tree_leaves(result):
                if isinstance(x, Tensor):
                    self.follow(x)
        return result

    def _moves_rows(self, name: str, args: Any) -> bool:
        if name in _ALWAYS:
            return True
        if name in _READS:
            self.answers |= self.asked in _ANSWERS
            return self.asked not in _ANSWERS
        if name == "embedding":
            return self.of_data(args[0])
        if name in _BY_INDEX:
            return self._moves_by_index(args, writes="put" in name)
        if name not in _ALONG_DIM or len(args) < 3 or not self.of_data(args[2]):
            return False
        written = args[3] if len(args) > 3 else None
        moved = args[0] if name in ("gather", "index_select") else written
        return self.of_data(moved) and args[0].ndim > 0 and self._may_be_rows(args[0].shape[args[1]])

    def _moves_by_index(self, args: Any, writes: bool) -> bool:
        source, indices = args[0], args[1]
        if writes and args[2].numel() == 1:
            return False  # the same value wherever it goes
        if not self.of_data(args[2] if writes else source):
            return False  # rows of a table, by the data: they come in the order of the index
        dim = 0
        for index in indices:
            by_mask = index is not None and index.dtype.itemsize == 1 and not index.is_floating_point()
            if self.of_data(index) and (by_mask or self._may_be_rows(source.shape[dim])):
                return True
            dim += index.ndim if by_mask else 1
        return False

    def _may_be_rows(self, size: int) -> bool:
        return self.views > 1 and size % self.views == 0


def _place(x: Tensor) -> Any:
    """Identify a tensor's storage; its views have the same."""
    return x.untyped_storage()._cdata


class _ToPython(TorchFunctionMode):
    """Notices which function is called, and values that reach Python past the dispatcher."""

    def __init__(self, flow: DataFlow) -> None:
        super().__init__()
        self.flow = flow

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _TO_PYTHON and args and self.flow.of_data(args[0]):
            self.flow.moves_rows = True
        self.flow.asked = name
        try:
            result = func(*args, **(kwargs or {}))
        finally:
            self.flow.asked = ""
        if self.flow.answers and isinstance(result, float):
            self.flow.moves_rows = True  # too many values to remember
        return result


class Answers(TorchFunctionMode):
    """Records what tensors told Python in a forward pass: with equal answers, a model takes the same branches.

    Attributes:
        values: in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.values: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, bool | int) and getattr(func, "__name__", "") in _ANSWERS:
            self.values.append(result)
        return result
