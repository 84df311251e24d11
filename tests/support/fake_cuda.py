"""A CUDA device that is not there: streams, events and graphs of torch, on tensors in main memory.

Operations run at once, in the order of the program. What a device would be free to reorder is
followed by clocks: each stream counts its operations, and knows how many of every other stream it
has waited for. An operation that touches memory which another stream wrote, and nobody waited for,
is a race; so is memory that is given back while another stream may still use it. A graph records
operations and runs them again on the same memory, as CUDA does.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READ_BY_KERNELS = {"hidden", "weight", "bias_ptr", "cu_seqlens_ptr", "first_text_ptr", "text_ptr"}
"""Kernel arguments that are inputs; all others count as written."""

NOT_IN_A_GRAPH = (
    "_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select", "unique",
    "lift_fresh", "repeat_interleave.Tensor",
)  # fmt: skip
"""Operations that wait for the device, or bring constants of the host: no capture allows them."""


class Stream:
    """A queue of operations."""

    def __init__(self, cuda, number):
        self.cuda, self.number = cuda, number
        self.clock = {}

    def wait_event(self, event):
        join(self.clock, event.clock)

    def wait_stream(self, other):
        join(self.clock, other.clock)


class Event:
    """A place in a stream."""

    def __init__(self, cuda):
        self.cuda, self.clock = cuda, {}

    def record(self, stream=None):
        self.clock = dict((stream or self.cuda.current).clock)

    def synchronize(self):
        join(self.cuda.host, self.clock)


class Graph:
    """Operations and the memory they use."""

    def __init__(self, cuda):
        self.cuda, self.nodes, self.inputs, self.outputs = cuda, [], set(), set()
        self.pool = None

    def replay(self):
        self.cuda.touch(self.inputs, self.outputs | {self.pool}, "a replay")
        with self.cuda.unseen():
            for node in self.nodes:
                node()


def join(clock, other):
    for stream, count in other.items():
        clock[stream] = max(clock.get(stream, 0), count)


class FakeCuda(TorchDispatchMode):
    """Active as a context; `install` puts it in the place of `torch.cuda`."""

    def __init__(self):
        super().__init__()
        self.streams = []
        self.host = {}
        self.current = self.stream()
        self.written, self.used, self.owners, self.names = {}, {}, {}, {}
        self.faults = []
        self.recording = None
        self.pools = 0
        self.is_unseen = False

    def install(self, monkeypatch):
        empty, numpy = torch.empty, torch.Tensor.numpy

        def pinned(*args, pin_memory=False, **options):
            tensor = empty(*args, **options)
            if pin_memory:
                self.owners.pop(key_of(tensor), None)  # torch watches its use on all streams
            return tensor

        def read(tensor):
            self.check(key_of(tensor), self.host, "the host reads")
            return numpy(tensor)

        monkeypatch.setattr(torch, "empty", pinned)
        monkeypatch.setattr(torch.Tensor, "numpy", read)
        for name, stand_in in {
            "Stream": lambda device=None: self.stream(),
            "Event": lambda **options: Event(self),
            "CUDAGraph": lambda: Graph(self),
            "current_stream": lambda device=None: self.current,
            "stream": self.on,
            "device": lambda device: nullcontext(),
            "graph_pool_handle": self.new_pool,
            "graph": self.capture,
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)

    def stream(self):
        self.streams.append(Stream(self, len(self.streams)))
        return self.streams[-1]

    def new_pool(self):
        self.pools += 1
        return ("pool", self.pools)

    @contextmanager
    def on(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def unseen(self):
        before, self.is_unseen = self.is_unseen, True
        try:
            yield
        finally:
            self.is_unseen = before

    @contextmanager
    def capture(self, graph, pool=None, stream=None, capture_error_mode="global"):
        graph.pool = pool
        with self.on(stream):
            self.recording = graph
            try:
                yield
            finally:
                self.recording = None

    # What operations touch

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.is_unseen:
            return func(*args, **kwargs)
        self.forget_freed()
        if self.recording is not None and func.__name__.startswith(NOT_IN_A_GRAPH):
            self.faults.append(f"{func.__name__} in a graph")
        result = func(*args, **kwargs)
        given = {key_of(x): x for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)}
        made = [x for x in tree_leaves(result) if torch.is_tensor(x)]
        changed = {
            key_of(value)
            for value, argument in zip(args, func._schema.arguments, strict=False)
            if torch.is_tensor(value) and argument.alias_info and argument.alias_info.is_write
        }
        changed |= {key_of(x) for x in [kwargs.get("out")] if torch.is_tensor(x)}
        fresh = [x for x in made if key_of(x) not in given]
        if not changed and not fresh:
            return result  # a view
        for x in fresh:
            self.own(x, func.__name__)
        written = set() if "empty" in func.__name__ else {key_of(x) for x in fresh}
        self.record(self.again(func, args, kwargs, fresh), given, written | changed)
        self.touch(given.keys() - changed, written | changed, func.__name__)
        return result

    def own(self, tensor, name):
        key = key_of(tensor)
        self.written.pop(key, None)  # of memory that lay there before
        self.used.pop(key, None)
        self.owners[key] = self.current, StorageWeakRef(tensor.untyped_storage())
        self.names[key] = name

    def again(self, func, args, kwargs, fresh):
        def node():
            found = func(*args, **kwargs)
            for old, new in zip(fresh, tree_leaves(found), strict=False):
                old.copy_(new)

        return (lambda: None) if "empty" in func.__name__ else node

    def record(self, node, given, written):
        if self.recording is None:
            return
        self.recording.nodes.append(node)
        self.recording.inputs |= set(given) - self.recording.outputs
        self.recording.outputs |= written

    def kernel(self, plain):
        """A launch of Triton's interpreter as one operation."""

        def launch(executor, *args, **kwargs):
            self.forget_freed()
            with self.unseen():
                plain(executor, *args, **kwargs)
            named = [*zip(executor.arg_names, args, strict=False), *kwargs.items()]
            given = {n: getattr(x, "base", x) for n, x in named}
            tensors = {n: x for n, x in given.items() if torch.is_tensor(x)}
            keys = {n: key_of(x) for n, x in tensors.items()}
            written = {key for n, key in keys.items() if n not in READ_BY_KERNELS}
            name = executor.fn.__name__
            self.record(lambda: plain(executor, *args, **kwargs), keys.values(), written)
            self.touch(set(keys.values()) - written, written, name)

        return launch

    def opaque(self, function):
        """A function of tensors as one operation."""

        def call(*args):
            with self.unseen():
                result = function(*args)
            keys = {key_of(x) for x in args if torch.is_tensor(x)}
            self.own(result, "attention")

            def node():
                result.copy_(function(*args))

            self.record(node, keys, {key_of(result)})
            self.touch(keys, {key_of(result)}, "attention")
            return result

        return call

    def touch(self, read, written, name):
        if self.recording is not None:
            return  # nothing runs yet
        clock = self.current.clock
        join(clock, self.host)  # the host starts nothing before it knows what it knows
        clock[self.current.number] = clock.get(self.current.number, 0) + 1
        for key in [*read, *written]:
            self.check(key, clock, f"{name} on stream {self.current.number} reads")
        for key in written:
            for stream, count in self.used.get(key, {}).items():
                if clock.get(stream, 0) < count:
                    self.faults.append(
                        f"{name} on stream {self.current.number} writes {self.names.get(key, key)} "
                        f"while stream {stream} uses it"
                    )
            self.written[key] = self.current.number, clock[self.current.number]
        for key in [*read, *written]:
            self.used.setdefault(key, {})[self.current.number] = clock[self.current.number]

    def check(self, key, clock, who):
        stream, count = self.written.get(key, (0, 0))
        if clock.get(stream, 0) < count:
            self.faults.append(f"{who} {self.names.get(key, key)} before stream {stream} wrote it")

    def forget_freed(self):
        """Memory that went back: its stream may use it again at once, so others must be done."""
        for key, (owner, storage) in [*self.owners.items()]:
            if not storage.expired():
                continue
            known = dict(owner.clock)
            join(known, self.host)
            late = [s for s, count in self.used.get(key, {}).items() if known.get(s, 0) < count]
            if late:
                self.faults.append(
                    f"{self.names.get(key, key)} is free while stream {late[0]} uses it"
                )
            for table in (self.owners, self.written, self.used, self.names):
                table.pop(key, None)


def key_of(tensor):
    return tensor.untyped_storage()._cdata
